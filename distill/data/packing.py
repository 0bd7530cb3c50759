"""Packing of documents into rows of one length, by best fit, without cutting what fits a row.

Best-fit decreasing (Ding et al. 2024, arXiv 2404.10830): a document goes to the row with the least room that still holds
it. Only documents longer than a row are cut. Documents of a row do not see each other: positions start again with each, and
the model's attention mask is made from them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Segments:
    """A row: which pieces it holds, as (document, first token, end), and how many tokens these are."""

    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, piece: tuple[int, int, int]) -> None:
        self.pieces.append(piece)
        self.num_tokens += piece[2] - piece[1]


def pack(lengths: Sequence[int], row_length: int) -> list[Segments]:
    """Rows for documents of these lengths; every token is in exactly one row. Pieces of one token, from which nothing can
    be learned, are left out."""
    pieces = [
        (document, start, min(start + row_length, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, row_length)
    ]
    pieces = [piece for piece in pieces if piece[2] - piece[1] > 1]
    pieces.sort(key=lambda piece: (piece[1] - piece[2], piece))  # longest first, then as they came
    rows: list[Segments] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in pieces:
        size = piece[2] - piece[1]
        index = bisect_left(open_rows, (size, -1))
        if index < len(open_rows):
            _, number = open_rows.pop(index)
        else:
            number = len(rows)
            rows.append(Segments())
        rows[number].add(piece)
        room = row_length - rows[number].num_tokens
        if room > 1:
            insort(open_rows, (room, number))
    return rows
