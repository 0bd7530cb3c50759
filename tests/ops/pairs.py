"""Few rows of a table of parameters in which every pair of values still occurs.

Most faults need one value of one parameter, or two together (Kuhn, Wallace and Gallo, IEEE Trans. Softw. Eng. 30, 2004).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Row = Mapping[str, Hashable]
Pair = frozenset[tuple[str, Hashable]]


def pairs_of(row: Row) -> set[Pair]:
    """Every two parameters of a row with their values; of a row of one parameter, that one."""
    values = list(row.items())
    return {frozenset(pair) for pair in combinations(values, 2)} or {frozenset(values)}


def pairwise(rows: Sequence[Row]) -> list[int]:
    """Numbers of rows, ascending, that have every pair which the rows have: the row with most new pairs, again and again.

    The same numbers for the same rows; of rows that are equally good, the first.
    """
    remaining = {number: pairs_of(row) for number, row in enumerate(rows)}
    missing = set().union(*remaining.values())
    chosen = []
    while missing:
        best = max(remaining, key=lambda number: len(remaining[number] & missing))
        missing -= remaining.pop(best)
        chosen.append(best)
    return sorted(chosen)
