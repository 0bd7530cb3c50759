"""Masks of transformers that are ranges are recognised exactly, once; every other mask is left alone."""

import gc
from typing import Any

import pytest
import torch
from operands import RULES
from torch import Tensor

from xeco_convert.ops import mask_ranges
from xeco_convert.ops._latent_attention import visible_tokens
from xeco_convert.ops.mask_ranges import ranges_of

CAUSAL = {name: rule for name, rule in RULES.items() if rule.get("causal", True) and "softcap" not in rule}
SHAPES = [(1, 1), (1, 9), (2, 2), (7, 7), (7, 129), (129, 129), (5, 6)]


def mask_from(queries: int, tokens: int, rule: dict[str, Any], batch: int = 2) -> Tensor:
    """Boolean [B, 1, Q, T]."""
    q, rows = torch.empty(batch, queries, 1, 1), torch.empty(batch, tokens, 1)
    names = ("starts", "ends", "query_positions")
    starts, ends, positions = (rule.get(name) for name in names)
    return visible_tokens(q, rows, starts, ends, positions, True, rule.get("window", 0)).unsqueeze(1)


def again(mask: Tensor) -> Tensor:
    """The mask that the ranges found in a mask give."""
    ranges = ranges_of(mask)
    assert ranges is not None
    rule = {"starts": ranges.starts, "ends": ranges.ends, "query_positions": ranges.query_positions}
    assert all(x.dtype == torch.int64 and x.shape == mask.shape[:1] and x.is_contiguous() for x in rule.values())
    for low in (ranges.starts, ranges.ends):
        assert int(low.min()) >= 0 and int(low.max()) <= mask.shape[-1]
    return mask_from(mask.shape[2], mask.shape[3], {**rule, "window": ranges.window}, mask.shape[0])


@pytest.mark.parametrize("rule", CAUSAL)
def test_every_rule_is_found_in_its_mask(rule: str) -> None:
    mask = mask_from(7, 129, CAUSAL[rule])
    assert torch.equal(again(mask), mask)


@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_random_paddings_and_positions_are_found(queries: int, tokens: int, window: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(20):
        starts = torch.randint(0, tokens + 1, (batch,), generator=generator)
        rule = {
            "starts": starts,
            "ends": torch.maximum(starts, torch.randint(0, tokens + 1, (batch,), generator=generator)),
            "query_positions": torch.randint(-2, tokens + 3, (batch,), generator=generator),
            "window": window,
        }
        mask = mask_from(queries, tokens, rule, batch)
        found = ranges_of(mask)
        # Windows of different sequences can hide in each other where ranges are cut short; then there is no answer, and
        # the mask itself is used. Without a window every mask is found.
        assert found is not None or window > 0
        if found is not None:
            assert torch.equal(again(mask), mask)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_additive_masks_are_read_as_boolean_ones(hidden: float) -> None:
    mask = mask_from(7, 129, CAUSAL["left padding"])
    dtype = torch.bfloat16 if hidden == torch.finfo(torch.bfloat16).min else torch.float32
    assert torch.equal(again(torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)), mask)


def packed() -> Tensor:
    """Two sequences, one after the other in a row."""
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    return (document[:, None] == document).tril()[None, None]


def changed(row: int, column: int, value: bool) -> Tensor:
    mask = mask_from(7, 9, {}).clone()
    mask[1, 0, row, column] = value
    return mask


OTHERS = {
    "packed sequences": packed(),
    "a hole": changed(4, 2, False),
    "a look ahead": changed(2, 8, True),
    "one query in another place": mask_from(7, 9, {})[:, :, [0, 1, 2, 4, 3, 5, 6]],
    "everything": torch.ones(2, 1, 7, 9, dtype=torch.bool)[:, :, :, :].logical_and(torch.arange(9) != 4),
    "one for each head": mask_from(7, 9, {}).expand(-1, 3, -1, -1),
    "three dimensions": mask_from(7, 9, {})[:, 0],
    "a bias": torch.zeros(2, 1, 7, 9).masked_fill(~mask_from(7, 9, {}), -torch.inf) - torch.arange(9) * 0.1,
    "a penalty that still lets through": torch.zeros(2, 1, 7, 9).masked_fill(~mask_from(7, 9, {}), -10000.0),
    "integers": mask_from(7, 9, {}).long(),
    "no query": torch.ones(2, 1, 0, 9, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_masks_have_no_ranges(kind: str) -> None:
    assert ranges_of(OTHERS[kind]) is None


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that were looked at."""
    seen: list[Tensor] = []
    find = mask_ranges._find
    monkeypatch.setattr(mask_ranges, "_find", lambda mask: seen.append(mask.clone()) or find(mask))
    return seen


def test_a_mask_is_looked_at_once(looks: list[Tensor]) -> None:
    masks = [mask_from(7, 9, {}), mask_from(7, 9, {"window": 2})]
    first = [ranges_of(mask) for mask in masks]
    for _ in range(3):  # models with two kinds of layers use two masks in turn
        assert all(ranges_of(mask) is found for mask, found in zip(masks, first, strict=True))
    assert len(looks) == 2


def test_a_mask_that_was_changed_is_looked_at_again(looks: list[Tensor]) -> None:
    mask = mask_from(7, 9, {})
    assert ranges_of(mask) is not None
    mask[1, 0, 4, 2] = False
    assert ranges_of(mask) is None
    assert len(looks) == 2


def test_masks_of_inference_mode_are_looked_at_each_time(looks: list[Tensor]) -> None:
    with torch.inference_mode():
        mask = mask_from(7, 9, {})
        assert ranges_of(mask) is not None
        mask[1, 0, 4, 2] = False
        assert ranges_of(mask) is None
    assert len(looks) == 2


def test_a_mask_is_forgotten_when_it_goes() -> None:
    before = len(mask_ranges._seen)
    mask = mask_from(7, 9, {})
    ranges_of(mask)
    assert len(mask_ranges._seen) == before + 1
    del mask
    gc.collect()
    assert len(mask_ranges._seen) == before
