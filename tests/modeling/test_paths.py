"""Every implementation of attention gives the same result, for prefill, decode and chunked prefill."""

from collections.abc import Callable

import pytest
import torch
from builders import random_ids
from transformers import DynamicCache, PreTrainedModel, StaticCache

from xeco_convert.modeling import attention_xeco
from xeco_convert.ops import choice
from xeco_convert.ops.extension import extension

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")

LENGTH = 25


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Forces one implementation, and gives the list in which the paths that were taken are noted."""

    def force(path: str) -> list[str]:
        taken: list[str] = []

        def chosen(call: choice.AttentionCall, asked: str | None = None) -> choice.Choice:
            obstacle = choice.fused_obstacle(call)
            assert path != "fused" or obstacle is None, obstacle
            taken.append(path)
            return choice.Choice(path, "the test says so")

        monkeypatch.setattr(attention_xeco, "choose", chosen)
        return taken

    return force


def in_chunks(model: PreTrainedModel, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache, logits = DynamicCache(config=model.config), []
    for chunk in ids.split(sizes, dim=1):
        logits.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "sizes",
    [[LENGTH], [1] * LENGTH, [9, 1, 1, 14], [LENGTH - 1, 1], [2, 23]],
    ids=["prefill", "decode", "mixed", "last", "chunks"],
)
@pytest.mark.parametrize("path", ["absorbed", "reference", pytest.param("fused", marks=needs_extension)])
def test_all_paths_give_the_logits_of_the_expanded_one(
    model: PreTrainedModel, choose: Callable[[str], list[str]], sizes: list[int], path: str, tolerance: float
) -> None:
    ids = random_ids(2, LENGTH)
    taken = choose("expanded")
    expected = in_chunks(model, ids, sizes)
    assert set(taken) == {"expanded"}
    taken = choose(path)
    found = in_chunks(model, ids, sizes)
    assert set(taken) == {path}
    assert (found - expected).abs().max() / expected.std() < tolerance


def test_a_cached_run_equals_one_without_cache(model: PreTrainedModel, tolerance: float) -> None:
    ids = random_ids(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    found = in_chunks(model, ids, [9, 1, 1, 14])
    assert (found - expected).abs().max() / expected.std() < tolerance


def test_eager_and_sdpa_give_the_same_logits(model: PreTrainedModel, tolerance: float) -> None:
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :6] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    try:
        found = model(ids, attention_mask=mask).logits
    finally:
        model.set_attn_implementation("sdpa")
    kept = mask.bool()
    assert (found - expected)[kept].abs().max() / expected.std() < tolerance


def test_attention_weights_are_given_by_the_eager_implementation(model: PreTrainedModel) -> None:
    ids = random_ids(2, 11)
    model.set_attn_implementation("eager")
    try:
        output = model(ids, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    heads = model.config.num_attention_heads
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (2, heads, 11, 11)
    ] * model.config.num_hidden_layers
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 11))
        assert float(weights.triu(diagonal=1).abs().max()) == 0


@pytest.mark.parametrize("path", ["absorbed", "expanded", "reference", pytest.param("fused", marks=needs_extension)])
def test_prefill_of_a_static_cache_does_not_look_at_unused_slots(
    model: PreTrainedModel, choose: Callable[[str], list[str]], path: str, tolerance: float
) -> None:
    """transformers gives no mask there, although the cache returns more slots than there are queries."""
    ids = random_ids(2, 10)
    expected = model(ids, use_cache=False).logits
    choose(path)
    cache = StaticCache(config=model.config, max_cache_len=32)
    found = [model(ids[:, :7], past_key_values=cache, use_cache=True).logits]
    found += [
        model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits for position in (7, 8, 9)
    ]
    assert (torch.cat(found, dim=1) - expected).abs().max() / expected.std() < tolerance
