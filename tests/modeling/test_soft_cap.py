"""Soft-capped layers (Gemma 2) in the compiled kernels, in plain torch and in the reference: one result, no silent way round."""

import copy
from typing import Any

import pytest
import torch
from builders import exact_model, random_ids, source_model
from transformers import DynamicCache, PreTrainedModel

from xeco_convert.modeling import LatentSelfAttention
from xeco_convert.ops import fused
from xeco_convert.ops.choice import AttentionChoiceError
from xeco_convert.ops.extension import extension

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")
# In float32, relative to the logits' standard deviation: 2e-6 was observed.
TOLERANCE = 2e-5
LENGTH = 19  # beyond the window of 7


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return source_model("gemma2")


@pytest.fixture(scope="module")
def gemma(source: PreTrainedModel) -> PreTrainedModel:
    return exact_model(source)


@pytest.fixture
def caps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float | None]]:
    """The kernels that were called, and their caps."""
    calls: list[tuple[str, float | None]] = []
    for name in ("latent_attention", "latent_attention_decode"):
        original = getattr(fused, name)

        def noted(*tensors: Any, original: Any = original, name: str = name, **settings: Any) -> Any:
            calls.append((name, settings.get("softcap")))
            return original(*tensors, **settings)

        monkeypatch.setattr(fused, name, noted)
    return calls


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :6] = 0
    return random_ids(2, LENGTH), mask


def in_chunks(model: PreTrainedModel, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache, logits = DynamicCache(config=model.config), []
    for chunk in ids.split(sizes, dim=1):
        logits.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@needs_extension
def test_the_kernels_are_taken_when_asked_for_and_told_the_cap(
    gemma: PreTrainedModel, source: PreTrainedModel, caps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XECO_ATTENTION", "fused")
    ids = random_ids(2, LENGTH)
    assert difference(gemma(ids).logits, source(ids).logits) < TOLERANCE
    assert caps == [("latent_attention", 3.0)] * 3
    caps.clear()
    assert difference(in_chunks(gemma, ids, [9, 1, 1, 8]), source(ids).logits) < TOLERANCE
    assert {name for name, _ in caps} == {"latent_attention", "latent_attention_decode"}
    assert {cap for _, cap in caps} == {3.0} and len(caps) == 12


@needs_extension
@pytest.mark.parametrize("name", ["fused", None])
def test_left_padding_and_windows_give_the_logits_of_the_source(
    name: str | None, gemma: PreTrainedModel, source: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XECO_ATTENTION", raising=False)
    if name is not None:
        monkeypatch.setenv("XECO_ATTENTION", name)
    ids, mask = padded()
    kept = mask.bool()
    found, expected = gemma(ids, attention_mask=mask).logits[kept], source(ids, attention_mask=mask).logits[kept]
    assert difference(found, expected) < TOLERANCE


@needs_extension
def test_the_kernels_are_chosen_where_they_are_for_other_layers(
    gemma: PreTrainedModel, caps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers runs the model eagerly, because it has no other way with a soft cap."""
    monkeypatch.delenv("XECO_ATTENTION", raising=False)
    attention = next(module for module in gemma.modules() if isinstance(module, LatentSelfAttention))
    assert attention.explain_choice(1, 900).startswith("fused: one query over a cache")
    ids = random_ids(2, LENGTH)
    in_chunks(gemma, ids, [LENGTH - 1, 1])
    assert ("latent_attention_decode", 3.0) in caps


@pytest.mark.parametrize("names", [["reference", "fused"], ["reference", None]], ids=str)
@pytest.mark.usefixtures("gradients")
def test_gradients_are_those_of_the_reference(
    names: list[str | None], gemma: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fused" in names and extension() is None:
        pytest.skip("the extension is not built")
    ids, mask = padded()
    labels = ids.clone()
    labels[1, :7] = -100  # what padding would predict: a query that sees nothing may give anything
    found = []
    for name in names:
        student = copy.deepcopy(gemma).train()
        if name is None:
            monkeypatch.delenv("XECO_ATTENTION")
        else:
            monkeypatch.setenv("XECO_ATTENTION", name)
        student(ids, attention_mask=mask, labels=labels).loss.backward()
        found.append({key: parameter.grad for key, parameter in student.named_parameters()})
    for key, expected in found[0].items():
        scale = float(expected.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            found[1][key], expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("asked", ["kwargs", "configuration"])
def test_weights_are_given_to_those_who_ask(
    asked: str, gemma: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XECO_ATTENTION", raising=False)
    eager, ids = copy.deepcopy(gemma), random_ids(1, 9)
    eager.set_attn_implementation("eager")
    if asked == "configuration":
        eager.config.output_attentions = True
    output = eager(ids, **({"output_attentions": True} if asked == "kwargs" else {}))
    assert len(output.attentions) == 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 9))
    assert difference(output.logits, gemma(ids).logits) < TOLERANCE


def test_what_bounds_no_scores_is_refused_by_name(gemma: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XECO_ATTENTION", "sdpa")
    with pytest.raises(
        AttentionChoiceError, match=r"XECO_ATTENTION=sdpa cannot serve this call: it does not bound scores"
    ):
        gemma(random_ids(1, 4))


@pytest.mark.parametrize("sizes", [[LENGTH], [9, 1, 1, 8]], ids=str)
def test_the_bias_of_unrotated_keys_counts_under_a_cap(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax ignores it otherwise, and attention over latents leaves it out: such layers expand, and say so."""
    source = source_model("gemma2", attention_bias=True)
    model, ids = copy.deepcopy(exact_model(source)), random_ids(2, LENGTH)
    attentions = [module for module in model.modules() if isinstance(module, LatentSelfAttention)]
    assert attentions[0].kv_b_proj.bias is not None and attentions[0].kv_b_proj.bias.any()
    monkeypatch.delenv("XECO_ATTENTION", raising=False)
    assert difference(in_chunks(model, ids, sizes), source(ids).logits) < TOLERANCE
    assert "bias of kv_b_proj counts under a soft cap" in attentions[0].explain_choice(1, 9)
    monkeypatch.setenv("XECO_ATTENTION", "fused")
    with pytest.raises(AttentionChoiceError, match="the bias of kv_b_proj counts under a soft cap"):
        model(ids)
