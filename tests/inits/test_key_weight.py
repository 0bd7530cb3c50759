"""How much keys count beside values: the candidate is taken whose attention puts out the least error, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs

import xeco_convert
from xeco_convert.calibration import survey
from xeco_convert.calibration.stream import LayerView
from xeco_convert.factorize import MlaAttention
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.inits.calibrated import key_weight
from xeco_convert.inits.calibrated.layers import CalibratedLayers


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_latent_gives_room_to_what_counts_more(groups: int) -> None:
    """Less weight of keys: a larger error of keys and a smaller one of values; at full width nothing is lost either way."""
    source, x = random_attention(4, groups), gaussian_inputs(windows=16)
    context = context_of(source)
    statistics = calibrated(source, x, context)._statistics
    layers = [CalibratedLayer(source, statistics, context.softmax_scale, key_weight=weight) for weight in (1.0, 0.1)]
    full = 2 * groups * 8
    heavy, light = (layer.errors(full // 4, 2) for layer in layers)
    assert light.key > heavy.key and light.value < heavy.value
    expected = mla_output(layers[0].factors(full, groups * 8), 4, x, context)
    torch.testing.assert_close(mla_output(layers[1].factors(full, groups * 8), 4, x, context), expected)
    for layer in layers:
        assert layer.expected_error(full, groups * 8) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("rope", [0, 4, 6])
def test_weighing_keys_anew_is_weighing_them_from_the_beginning(rope: int) -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=16)
    context = context_of(source)
    first = calibrated(source, x, context)
    first.factors(8, rope)  # what is kept of the old weight is not taken for the new one
    anew = first.with_key_weight(0.3)
    expected = CalibratedLayer(source, first._statistics, context.softmax_scale, key_weight=0.3)
    outputs = [mla_output(layer.factors(8, rope), 4, x, context) for layer in (anew, expected)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert vars(anew.errors(8, rope)) == pytest.approx(vars(expected.errors(8, rope)))
    assert anew.key_weight == 0.3
    assert anew.expected_error(8, rope) == pytest.approx(expected.expected_error(8, rope))
    assert first.key_weight == 1.0


@pytest.mark.parametrize("rope", [2, 4])
def test_the_best_of_the_candidates_is_converted(
    rope: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the closed form's error on the windows that choose between fits, as the report has it on those that measure."""
    errors: dict[float, list[float]] = {}
    ids = torch.randint(3, 90, (36, 40), generator=torch.Generator().manual_seed(2)).tolist()
    (tmp_path / "ids.json").write_text(str(ids))
    # what chooses is what the report measures: the same windows, and tokens that weigh alike
    monkeypatch.setattr(survey, "MEASURING_TOKENS", 10**6)

    def errors_as_chosen(self: CalibratedLayers, view: LayerView, heads: int, *layers: MlaAttention) -> list[float]:
        part = slice(self._measurements.held_out_from, None)
        inputs, target = view.inputs[part], view.attention_output[part]
        shares = 1 / (inputs + target).square().mean(dim=-1)
        outputs = [mla_output(layer, heads, view.normed(inputs), view.context()) for layer in layers]
        return [float(((output - target).square().mean(dim=-1) * shares).sum()) for output in outputs]

    monkeypatch.setattr(CalibratedLayers, "_errors", errors_as_chosen)
    for weights in ((1.0,), (0.5,), (0.25,), key_weight.KEY_WEIGHTS):
        monkeypatch.setattr(key_weight, "KEY_WEIGHTS", weights)
        report = xeco_convert.convert(
            llama,
            tmp_path / f"out-{len(errors)}",
            rank=6,
            rope_dim=rope,
            calibration=str(tmp_path / "ids.json"),
            calibration_tokens=1024,
        )
        found = [layer.details["closed_form_error"] for layer in report.layers]
        chosen = [layer.details["key_weight"] for layer in report.layers]
        if len(weights) == 1:
            errors[weights[0]] = found
            assert set(chosen) == set(weights)
    for number, (error, weight) in enumerate(zip(found, chosen, strict=True)):
        best = min(errors, key=lambda each: errors[each][number])
        assert (weight, error) == (best, pytest.approx(errors[best][number]))
