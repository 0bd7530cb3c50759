"""Calibration tokens as windows of equal length, from text files, data sets, or the source model's own samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.errors import CheckpointError

LEAST_TOKENS = 1024  # fewer tokens than this leave most directions of a hidden_size of a few hundred unseen
_MOST_UNKNOWN_SHARE = 0.2
_GOLDEN_RATIO = (1 + 5**0.5) / 2


@dataclass(frozen=True, kw_only=True)
class CalibrationWindows:
    """Token ids [W, T] int64, padded on the right, and which of them count [W, T] bool.

    Padding and special tokens do not count: no statistic asks what they look at. They stay visible as keys, as they are
    for the model: the first token of a sequence, special or not, receives much of the attention.
    """

    ids: Tensor
    counts: Tensor
    description: str

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return int(self.counts.sum())

    def checked(self, unknown_id: int | None) -> CalibrationWindows:
        """The windows, if there are enough of them and the tokenizer knows their text. Raises `CheckpointError`."""
        if self.num_tokens < LEAST_TOKENS:
            raise CheckpointError(
                f"--calibration: {self.description} holds {self.num_tokens} usable tokens, expected at least {LEAST_TOKENS}, "
                "better 10,000; give more text, or leave --calibration out to sample from the source model."
            )
        unknown = 0 if unknown_id is None else int(((self.ids == unknown_id) & self.counts).sum())
        if unknown > _MOST_UNKNOWN_SHARE * self.num_tokens:
            raise CheckpointError(
                f"--calibration: the tokenizer maps {unknown / self.num_tokens:.0%} of {self.description} to its unknown token; "
                "give text in the model's own language and script."
            )
        return self

    def first(self, num_windows: int, length: int | None = None) -> CalibrationWindows:
        """The first windows alone, or their first `length` tokens."""
        part = slice(num_windows), slice(length)
        return CalibrationWindows(ids=self.ids[part], counts=self.counts[part], description=self.description)


def windows_of_documents(
    documents: list[list[int]], *, length: int, num_tokens: int, special_ids: frozenset[int], description: str
) -> CalibrationWindows:
    """Windows of `length` tokens, about `num_tokens` in all, documents cut into pieces and never joined.

    A piece shorter than the window is padded on the right, where causal attention does not see it. Where there is more text than
    that, the windows come from all of it, evenly spread, in an order of which every part is: neighbours say much the same, and
    statistics of a few articles do not carry over to others. Ends of documents that fill no window are left out then, if the rest
    is enough.
    """
    pieces = [document[start : start + length] for document in documents for start in range(0, len(document), length)]
    if sum(map(len, pieces)) > num_tokens:
        # of each document what fills windows, or all of a shorter one
        full = [
            d[start : start + length] for d in documents if d for start in range(0, max(1, len(d) - length + 1), length)
        ]
        pieces = full if sum(map(len, full)) >= num_tokens else pieces
        pieces = [pieces[place] for place in _evenly_spread(len(pieces))]
    rows: list[list[int]] = []
    taken = 0
    for piece in pieces:
        if taken >= num_tokens:
            break
        rows.append(piece)
        taken += len(piece)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    counts = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        counts[number, : len(row)] = torch.tensor([token not in special_ids for token in row])
    return CalibrationWindows(ids=ids, counts=counts, description=description)


def _evenly_spread(count: int) -> list[int]:
    """The places 0 … count - 1 in an order of which every part, from wherever to wherever, is evenly spread: that of the
    fractions of multiples of the golden ratio (three-distance theorem)."""
    return sorted(range(count), key=lambda place: place * _GOLDEN_RATIO % 1)
