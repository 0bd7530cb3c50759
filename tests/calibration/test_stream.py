"""The streamed source is the source: hidden states of every layer as the whole model computes them; fidelity by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import ROPES, VARIANTS, build_checkpoint, random_ids
from calibrated_layers import source_output
from sources import plan_for, random_windows
from transformers import AutoModelForCausalLM, PreTrainedModel

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.stream import OutputHead, SourceStream
from xeco_convert.quality.fidelity import stream_divergences, stream_fidelity
from xeco_convert.source_attention import read_attention

CASES = [(variant, "default") for variant in VARIANTS] + [("qwen2_window", rope) for rope in ROPES if rope != "default"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("variant", "rope"), CASES)
def test_layers_are_those_of_the_whole_model(variant: str, rope: str, tmp_path: Path) -> None:
    shards = 2 if variant == "qwen2" else 1
    folder = build_checkpoint(tmp_path / "in", variant, rope, num_shards=shards)
    kind = "eager" if variant == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind).eval()
    # within the positions that the dynamic type was trained on, where the whole model keeps its frequencies
    windows = random_windows(5, 15 if rope == "dynamic" else 20)
    hidden: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    plan = plan_for(folder, layers="0-2")
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda _module, arguments: hidden.append(arguments[0].clone()))
        module = plan.source.attention_of(layer)
        module.register_forward_hook(lambda _module, _arguments, output: attention.append(output[0].clone()))
    with torch.no_grad():
        logits = model(windows.ids).logits
    stream = SourceStream(plan.source, windows, CPU)
    for _ in range(2):  # it may be gone through more than once
        for view in stream.layers():
            torch.testing.assert_close(view.inputs, hidden[view.number], rtol=1e-4, atol=1e-5)
            last = view
            source = read_attention(plan.source, stream._reader, view.number, CPU)
            found = source_output(source, view.normed(view.inputs), view.context())
            torch.testing.assert_close(found, attention[view.number], rtol=1e-4, atol=1e-5)
            again = view.run_with_attention(view.inputs, found)
            torch.testing.assert_close(again, view.outputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(view.run(view.inputs), view.outputs, rtol=1e-4, atol=1e-5)
            beginnings = view.run(view.inputs[:, :7]), view.run_with_attention(view.inputs[:, :7], found[:, :7])
            for outputs in beginnings:
                torch.testing.assert_close(outputs, view.outputs[:, :7], rtol=1e-4, atol=1e-5)
            assert type(view.attention).__name__ != "_Given"
            assert view.inputs.dtype == torch.float32
    for view, whole in zip(stream.layers(2), hidden, strict=True):
        torch.testing.assert_close(view.inputs, whole[:2], rtol=1e-4, atol=1e-5)
        assert view.counts.shape == view.outputs.shape[:2] == (2, windows.ids.shape[1])
    assert last.number == 2
    # the outputs of the last layer are the final hidden states, whose logits are the model's
    torch.testing.assert_close(stream.output_head().logits(last.outputs), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_errors_weigh_as_the_norm_that_follows_makes_of_them(variant: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "in", variant)
    plan = plan_for(folder, layers="0-2")
    view = next(iter(SourceStream(plan.source, random_windows(2, 20), CPU).layers()))
    seen: list[torch.Tensor] = []
    for module in view.layer.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].clone()))
    view.run(view.inputs)
    weights = view.token_weights(slice(None))
    parallel = getattr(view.layer, "use_parallel_residual", False)  # there the next layer's norm follows
    following = [1 / each.square().mean(dim=-1) for each in seen if each.shape == view.inputs.shape]
    if not parallel:
        assert any(torch.allclose(weights, each, rtol=1e-3) for each in following)
    torch.testing.assert_close(view.output_weights(slice(None)), 1 / view.outputs.square().mean(dim=-1))


def test_one_layer_is_in_memory_at_a_time(llama: Path) -> None:
    stream = SourceStream(plan_for(llama).source, random_windows(), CPU)
    for view in stream.layers():
        held = [not next(layer.parameters()).is_meta for layer in stream._skeleton.layers]
        assert held == [number == view.number for number in range(3)]
        assert not any(parameter.requires_grad for parameter in view.layer.parameters())


def test_weights_of_half_precision_are_computed_in_float32(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "in", "llama", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = random_windows()
    stream = SourceStream(plan_for(folder).source, windows, CPU)
    *_, last = stream.layers()
    with torch.no_grad():
        expected = model(windows.ids).logits
    torch.testing.assert_close(stream.output_head().logits(last.outputs), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def pair(llama: Path) -> tuple[OutputHead, PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(head, model, ids, final hidden states before the norm, the same with noise)."""
    ids = random_ids(4, 20)
    windows = CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="random")
    stream = SourceStream(plan_for(llama).source, windows, CPU)
    *_, last = stream.layers()
    noise = torch.randn(last.outputs.shape, generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    return stream.output_head(), model, ids, last.outputs, last.outputs + 0.5 * noise


def test_fidelity_is_that_of_the_formulas(
    pair: tuple[OutputHead, PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    head, model, ids, source, converted = pair
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[0, 0] = counts[1, 5] = False
    counts[3, 7:] = False
    found = stream_fidelity(head, source, converted, ids, counts)
    losses, other_losses, kl, agreeing = [], [], [], []
    with torch.no_grad():
        logp, other = (model.lm_head(model.model.norm(part)).double().log_softmax(-1) for part in (source, converted))
    for window in range(4):
        for place in range(19):
            if counts[window, place] and counts[window, place + 1]:
                p, q, token = logp[window, place], other[window, place], int(ids[window, place + 1])
                losses.append(-float(p[token]))
                other_losses.append(-float(q[token]))
                kl.append(float((p.exp() * (p - q)).sum()))
                agreeing.append(int(p.argmax()) == int(q.argmax()))
    count = len(losses)
    assert found.num_tokens == count == 18 + 17 + 19 + 6 and found.num_windows == 4
    assert found.perplexity_source == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)
    assert found.perplexity == pytest.approx(torch.tensor(other_losses).mean().exp().item(), rel=1e-4)
    assert found.kl == pytest.approx(sum(kl) / count, rel=1e-4)
    assert found.top1 == sum(agreeing) / count


def test_single_tokens_do_not_decide_a_divergence(
    pair: tuple[OutputHead, PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Of 80 tokens the two of the largest divergence count as the third does; the others as they are."""
    head, _, ids, source, converted = pair
    counts = torch.ones_like(ids, dtype=torch.bool)
    plain, odd = source + 0.1 * (converted - source), source + 0.1 * (converted - source)
    odd[2, 7] = -10 * source[2, 7]
    found = stream_divergences(head, source, [plain, odd], counts, 80)
    assert found[1] == pytest.approx(found[0], rel=0.1) and found[0] > 0
    whole = [stream_fidelity(head, source, other, ids, counts).kl for other in (plain, odd)]
    assert found[0] == pytest.approx(whole[0], rel=0.1) and whole[1] > 3 * whole[0]


def test_fidelity_of_the_source_with_itself_is_perfect_and_needs_a_prediction(
    pair: tuple[OutputHead, PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    head, _, ids, source, _ = pair
    found = stream_fidelity(head, source, source, ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1 and found.gap == pytest.approx(0, abs=1e-6)
    alone = torch.zeros_like(ids, dtype=torch.bool)
    alone[:, 3] = True
    with pytest.raises(ValueError, match="no token to measure on"):
        stream_fidelity(head, source, source, ids, alone)
