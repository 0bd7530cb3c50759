"""Errors of many widths from few measurements: exact where measured, near elsewhere, whatever the bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs, output_error

from xeco_convert.calibration import output_errors
from xeco_convert.calibration.output_errors import estimated_errors
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.spread import with_codes
from xeco_convert.ranks import Widths

BITS = ((16, 16), (8, 8), (4, 8), (4, 4))


def layer_and_measure(**source: bool) -> tuple[CalibratedLayer, Callable[[Widths], float], list[Widths]]:
    """A closed form, what measures widths of it, and what was measured."""
    attention, x = random_attention(8, 4, **source), gaussian_inputs(windows=16)
    context = context_of(attention)
    layer, asked = calibrated(attention, x, context), []

    def measure(widths: Widths) -> float:
        asked.append(widths)
        factors = layer.factors(widths.kv_lora_rank, widths.qk_rope_head_dim)
        if widths.bits != (16, 16):
            energies = layer.energies(widths.kv_lora_rank, widths.qk_rope_head_dim)
            factors = with_codes(factors, 8, *widths.bits, energies)
        return output_error(attention, factors, x, context)

    return layer, measure, asked


def offers(ranks: range, ropes: range, bits: tuple[tuple[int, int], ...] = BITS) -> list[Widths]:
    every = ((rank, rope, *pair) for pair in bits for rank in ranks for rope in ropes)
    return [Widths(kv_lora_rank=r, qk_rope_head_dim=p, latent_bits=b, rope_bits=c) for r, p, b, c in every]


@pytest.mark.parametrize("bits", [BITS[:1], BITS[1:2], BITS[2:], BITS])
def test_what_was_not_measured_is_near_to_what_it_would_have_been(bits: tuple[tuple[int, int], ...]) -> None:
    layer, measure, asked = layer_and_measure()
    some = offers(range(4, 25, 4), range(4, 17, 4), bits)
    found = estimated_errors(some, layer, measure)
    assert list(found) == some and len(asked) == len(set(asked))
    rotary_bits = {each.rope_bits for each in some} - {16}
    most = output_errors._MOST_MEASURED + output_errors._ROTARY_WIDTHS * (1 + len(rotary_bits)) * bool(rotary_bits)
    assert len(asked) <= most + output_errors._ROTARY_WIDTHS * max(0, len(rotary_bits) - 1)
    measured = set(asked)
    truth = {each: measure(each) for each in some}
    least = 1e-3 * max(truth.values())  # nobody chooses between errors below it
    apart = [abs(math.log((found[each] + least) / (truth[each] + least))) for each in some]
    for each, log in zip(some, apart, strict=True):
        assert each not in measured or log == 0
    assert max(apart) < 0.8 and sum(apart) / len(apart) < 0.15, (max(apart), sum(apart) / len(apart))


def test_more_codes_of_the_same_widths_never_seem_better() -> None:
    layer, measure, _ = layer_and_measure()
    found = estimated_errors(offers(range(8, 49, 8), range(8, 33, 8)), layer, measure)
    for widths in offers(range(8, 49, 8), range(8, 33, 8), BITS[:1]):
        errors = [found[Widths(**{**vars(widths), "latent_bits": b, "rope_bits": c})] for b, c in BITS]
        assert errors[0] <= errors[1] * 1.05 and errors[1] < errors[3]


@pytest.mark.parametrize("rotated", [True, False])
def test_what_keeps_everything_and_what_rotates_nothing(rotated: bool) -> None:
    """Full rank and a layer without rotation have no factor to find, and no rotary codes."""
    layer, measure, _ = layer_and_measure()
    ropes = range(16, 17) if rotated else range(0, 1)
    some = offers(range(48, 65, 8), ropes, ((16, 16), (8, 8)))
    found = estimated_errors(some, layer, lambda widths: 0.0 if widths.bits == (16, 16) else measure(widths))
    assert all(math.isfinite(error) and error >= 0 for error in found.values())
    assert found[some[2]] == pytest.approx(0.0, abs=1e-9)


def test_one_offer_is_measured_itself() -> None:
    layer, measure, _ = layer_and_measure()
    (one,) = offers(range(16, 17), range(8, 9), BITS[:1])
    assert estimated_errors([one], layer, measure) == {one: measure(one)}
