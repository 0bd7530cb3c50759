"""Refinement: a stage is kept only where the held-out error drops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from builders import VARIANTS, build_checkpoint, random_ids

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.stream import LayerView, SourceStream
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.refit_scores import ScoreRefit
from xeco_convert.factorize.statistics import StatisticsAccumulator
from xeco_convert.refine import LayerRefinement, RefineOptions
from xeco_convert.source import open_source
from xeco_convert.source_attention import read_attention


@dataclasses.dataclass(frozen=True)
class Setting:
    """The first layer of a tiny model, with its closed form."""

    view: LayerView
    source: SourceAttention
    start: MlaAttention


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = build_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama_bias")
    opened = open_source(CheckpointIndex.open(folder))
    ids = random_ids(160, 32, seed=4)
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 30:] = False
    windows = CalibrationWindows(ids=ids, counts=counts, description="random")
    view = next(SourceStream(opened, windows, torch.device("cpu")).layers())
    source = read_attention(opened, TensorReader(opened.index), 0, torch.device("cpu"))
    with torch.no_grad():
        accumulator = StatisticsAccumulator(source, view.context())
        accumulator.add(view.normed(view.inputs), counts)
        layer = CalibratedLayer(source, accumulator.result(), view.softmax_scale)
    return Setting(view, source, layer.factors(8, 4).to(torch.float32))


def refinement(setting: Setting, **options: float) -> LayerRefinement:
    fields = {"steps": 40, "batch_tokens": 512, "learning_rate": 2e-3, **options}
    return LayerRefinement(
        setting.view, setting.source.num_attention_heads, setting.view.inputs, 160, RefineOptions(**fields)
    )  # type: ignore[arg-type]


def test_the_held_out_error_is_that_of_counted_tokens_after_the_layer(setting: Setting) -> None:
    work, view = refinement(setting), setting.view
    held_out = slice(152, 160)
    with torch.no_grad():
        inputs = view.inputs[held_out]
        attention = mla_output(setting.start, 4, view.normed(inputs), view.context())
        outputs = view.run(view.inputs)
        weights = 1 / outputs.square().mean(dim=-1)  # so that no token with a massive activation decides alone
        error = (view.run_with_attention(inputs, attention) - outputs[held_out]).square().mean(dim=-1) * weights[
            held_out
        ]
        added = (outputs - view.inputs).square().mean(dim=-1) * weights
    expected = float(error[:, :30].mean() / added[:, :30].mean())
    assert work.held_out_error(setting.start) == pytest.approx(expected, rel=1e-4)


def test_each_stage_is_better_and_the_last_is_kept(setting: Setting) -> None:
    work = refinement(setting)
    refined = work.run(setting.start)
    assert refined.kept == "regression" and refined.seconds > 0
    assert refined.errors["regression"] < min(refined.errors["start"], refined.errors["refit"])
    assert work.held_out_error(refined.factors) == pytest.approx(refined.errors["regression"], rel=1e-6)
    assert not any(tensor.requires_grad for tensor in refined.factors.tensors().values())
    assert refined.factors.rope_index == setting.start.rope_index


def test_the_same_seed_gives_the_same_weights(setting: Setting) -> None:
    first, second, other = (refinement(setting, steps=12, seed=seed).run(setting.start).factors for seed in (0, 0, 1))
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    assert not torch.equal(first.kv_a_weight, other.kv_a_weight)


@pytest.mark.parametrize("rate", [50.0, 1e30])
def test_a_regression_that_fails_is_not_kept(rate: float, setting: Setting) -> None:
    """So large a rate ruins the weights, or makes them NaN: the best of the stages before is kept."""
    refined = refinement(setting, steps=5, learning_rate=rate).run(setting.start)
    assert refined.kept in ("start", "refit", "scores")
    assert refined.errors[refined.kept] == min(refined.errors.values())
    assert all(bool(tensor.isfinite().all()) for tensor in refined.factors.tensors().values())


def test_the_start_is_kept_where_nothing_is_better(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(mla: MlaAttention) -> MlaAttention:
        return mla.with_tensors({"o_weight": mla.o_weight * 3})

    monkeypatch.setattr(LayerRefinement, "_refit", lambda self, start: worse(start))
    monkeypatch.setattr(ScoreRefit, "offers", lambda self: iter([worse(setting.start)]))
    monkeypatch.setattr(LayerRefinement, "_regress", lambda self, start, *_: worse(start))
    refined = refinement(setting).run(setting.start)
    assert refined.kept == "start" and refined.factors is setting.start


def test_the_regression_stops_by_the_clock(setting: Setting) -> None:
    assert refinement(setting, steps=10**7, seconds=0.3).run(setting.start).seconds < 100  # of hours


def test_one_training_window_is_enough(setting: Setting) -> None:
    options = RefineOptions(steps=2)
    work = LayerRefinement(setting.view, setting.source.num_attention_heads, setting.view.inputs, 2, options)
    assert work.run(setting.start).errors.keys() == {"start", "refit", "scores", "regression"}


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"gemma2", "gemma3", "olmo2", "gpt_neox"}))
@torch.no_grad()
def test_an_attention_that_gives_its_target_makes_up_for_the_layers_below(variant: str, tmp_path: Path) -> None:
    """Also where a multiplier stands between attention and residual stream (Granite). Not where a norm does (Gemma, OLMo 2),
    nor where the feed-forward part reads the stream beside the attention (GPT-NeoX)."""
    opened = open_source(CheckpointIndex.open(build_checkpoint(tmp_path / "source", variant)))
    ids = random_ids(2, 16)
    windows = CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="random")
    view = next(SourceStream(opened, windows, torch.device("cpu")).layers())
    noise = torch.randn(view.inputs.shape, generator=torch.Generator().manual_seed(1))
    inputs = view.inputs + 0.3 * noise
    found = view.run_with_attention(inputs, view.attention_target(slice(None), inputs))
    torch.testing.assert_close(found, view.outputs, rtol=1e-4, atol=1e-4)  # 1.5e-6 observed
