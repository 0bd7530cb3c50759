"""The choice of rows leaves no pair of values out, and the tests of every instruction set are chosen so."""

from collections import defaultdict
from itertools import combinations, product

import pytest
from levels import BEST_LEVEL, LEVELS
from pairs import Row, pairwise

TABLES = [(3,), (3, 2), (14, 3, 2), (2, 2, 2, 2), (6, 4, 2, 2), (3, 1, 5)]


def rows_of(table: tuple[int, ...]) -> list[Row]:
    """The full product, in the order of pytest."""
    return [dict(zip("abcd", values, strict=False)) for values in product(*map(range, table))]


@pytest.mark.parametrize("table", TABLES)
def test_every_pair_of_values_occurs(table: tuple[int, ...]) -> None:
    rows = rows_of(table)
    chosen = [rows[number] for number in pairwise(rows)]
    numbers = dict(zip("abcd", table, strict=False))
    for one, other in combinations(numbers, 2):
        for values in product(range(numbers[one]), range(numbers[other])):
            assert any((row[one], row[other]) == values for row in chosen)
    for name, number in numbers.items():
        assert {row[name] for row in chosen} == set(range(number))


@pytest.mark.parametrize(("table", "number"), [((14, 3, 2), 42), ((2, 2, 2), 4), ((3, 2), 6), ((7,), 7)])
def test_there_are_few_rows_and_the_same_each_time(table: tuple[int, ...], number: int) -> None:
    """42 is the least for 14 sizes and 3 dtypes, 4 for three parameters of two values."""
    rows = rows_of(table)
    assert len(pairwise(rows)) == number
    assert pairwise(rows) == pairwise(list(rows))


def test_rows_that_are_no_full_product_keep_the_pairs_that_they_have() -> None:
    rows = [{"a": 0, "b": 0, "c": 0}, {"a": 1, "b": 1, "c": 1}, {"a": 0, "b": 1, "c": 0}]
    assert pairwise(rows) == [0, 1, 2]
    assert pairwise([]) == []
    assert pairwise([{}]) == [0]


def test_every_lesser_level_has_the_pairs_of_the_best(request: pytest.FixtureRequest) -> None:
    """Of each test that was collected for the best level in full; a part of the suite shows as much as it has."""
    seen: dict[str, dict[str, set[frozenset[tuple[str, int]]]]] = defaultdict(lambda: defaultdict(set))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("level") not in LEVELS or callspec.params["level"] == "cuda":
            continue
        function, level = item.nodeid.partition("[")[0], callspec.params["level"]
        values = [(name, id(value)) for name, value in callspec.params.items() if name != "level"]
        seen[function][level] |= {frozenset(pair) for pair in combinations(values, 2)} | {
            frozenset([one]) for one in values
        }
        counts[function][level] += 1
    for function, levels in seen.items():
        if set(levels) != {level for level in LEVELS if level != "cuda"}:
            continue  # a part of the suite
        for level in levels:
            assert levels[level] == levels[BEST_LEVEL], (function, level)
            assert counts[function][level] <= counts[function][BEST_LEVEL]
