"""The error of a layer's attention output at many widths, from measurements at a few of them.

What the closed form expects of some widths is off by a factor, since errors of the attended tokens cancel in part; but the factor
hardly differs between neighbours. So it is measured at widths spread over all of them and interpolated: on SmolLM2-135M, 8 of 12
measured leave 6 % of error in the others, about what the tokens that measure leave. Codes of latents add what their bits are
expected to lose, by the same factor. Those of rotary keys, which are not spread like a normal distribution, are measured at a
few rotary widths for every number of bits: they depend on little else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.spread import expected_loss
from xeco_convert.ranks import Widths

_MOST_MEASURED = 9  # widths whose factor is measured
_ROTARY_WIDTHS = 3  # where codes of rotary keys are measured, for each number of bits
_SIGNAL = 1e-6  # of the largest error that is expected: less is rounding, and no factor comes from it

Measure = Callable[[Widths], float]
# Takes the share that is done.
Share = Callable[[float], None]
Place = tuple[float, float]


def estimated_errors(
    offers: Sequence[Widths], layer: CalibratedLayer, measure: Measure, on_progress: Share = lambda share: None
) -> dict[Widths, float]:
    """Relative squared output error of every offer; `measure` gives that of any widths."""
    plain = {_in_16_bits(offer) for offer in offers}
    chosen = _spread_out(_ordered(plain), _MOST_MEASURED)
    probes = _rotary_probes([offer for offer in offers if offer.bits != (16, 16)])
    to_measure = {*chosen, *probes, *map(_in_16_bits, probes)}
    expected: dict[Widths, float] = {}
    measured: dict[Widths, float] = {}
    # those of equal rotary width in a row: each takes a decomposition of its own
    for widths in _ordered({*offers, *plain, *to_measure}):
        latent = dataclasses.replace(widths, rope_bits=16)  # what the bits of the rotary key add is measured
        if latent not in expected:
            lost = layer.expected_error(widths.kv_lora_rank, widths.qk_rope_head_dim)
            expected[latent] = lost + _latent_loss(layer, latent)
        expected[widths] = expected[latent]
        if widths in to_measure:
            on_progress(len(measured) / len(to_measure))
            measured[widths] = measure(widths)
    factor = _Factor(expected, {widths: measured[widths] for widths in measured if widths in plain})
    of_rotary_codes: dict[int, dict[int, float]] = {}
    for widths in probes:
        lost = max(measured[widths] - measured[_in_16_bits(widths)], 0.0)
        of_rotary_codes.setdefault(widths.rope_bits, {})[widths.qk_rope_head_dim] = lost
    errors: dict[Widths, float] = {}
    for offer in offers:
        of_codes = _between(of_rotary_codes.get(offer.rope_bits, {}), offer.qk_rope_head_dim)
        errors[offer] = measured.get(offer, factor.at(offer) * expected[offer] + of_codes)
    return errors


class _Factor:
    """Measured by expected error, as a function of the widths: a plane in logarithms, and what it leaves at the nearest."""

    def __init__(self, expected: Mapping[Widths, float], measured: Mapping[Widths, float]) -> None:
        least = _SIGNAL * max(expected.values())
        known = {_place(each): error / expected[each] for each, error in measured.items() if expected[each] > least}
        self._places: NDArray[np.float64] = np.array([*known], dtype=np.float64).reshape(-1, 2)
        logs: NDArray[np.float64] = np.log(np.maximum(np.array([*known.values()], dtype=np.float64), 1e-300))
        terms = self._terms(self._places)
        self._plane: NDArray[np.float64] = np.linalg.pinv(terms) @ logs  # zero where nothing is known
        self._left: NDArray[np.float64] = logs - terms @ self._plane

    def at(self, widths: Widths) -> float:
        place = np.array(_place(widths))
        log = float(self._terms(place[None])[0] @ self._plane)
        if self._left.size:
            nearness = 1 / (np.square(self._places - place).sum(axis=1) + 1e-12)
            log += float(nearness @ self._left / nearness.sum())
        return math.exp(log)

    @staticmethod
    def _terms(places: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([np.ones((len(places), 1)), places], axis=1)


def _place(widths: Widths) -> Place:
    return math.log2(widths.kv_lora_rank), math.log2(max(1, widths.qk_rope_head_dim))


def _spread_out(widths: Sequence[Widths], count: int) -> list[Widths]:
    """At most `count` of them: the middle one, then always the one that is farthest from those taken."""
    chosen = [sorted(widths, key=lambda each: each.total)[len(widths) // 2]]
    while len(chosen) < min(count, len(widths)):
        chosen.append(max(widths, key=lambda each: min(math.dist(_place(each), _place(other)) for other in chosen)))
    return chosen


def _rotary_probes(coded: Sequence[Widths]) -> list[Widths]:
    """Offers with their latents in 8 bits, where they lose nothing, at a few rotary widths for each of their rotary bits."""
    turned = sorted({offer.qk_rope_head_dim for offer in coded if offer.qk_rope_head_dim})
    if not turned:
        return []
    aims = np.geomspace(turned[0], turned[-1], _ROTARY_WIDTHS)
    probes = {}
    for bits in sorted({offer.rope_bits for offer in coded}):
        own = [offer for offer in coded if offer.rope_bits == bits]
        for aim in aims:
            nearest = min(own, key=lambda offer: (abs(offer.qk_rope_head_dim - aim), offer.total))
            if nearest.qk_rope_head_dim:
                probes[bits, nearest.qk_rope_head_dim] = dataclasses.replace(nearest, latent_bits=8)
    return list(probes.values())


def _latent_loss(layer: CalibratedLayer, offer: Widths) -> float:
    """What the codes of the latent are expected to lose, as a share of the output."""
    if offer.latent_bits == 16:
        return 0.0
    energies = layer.energies(offer.kv_lora_rank, offer.qk_rope_head_dim)
    return layer.as_share(expected_loss(energies.latent, offer.latent_bits))


def _between(known: Mapping[int, float], place: int) -> float:
    """Linear between the known places, beyond them the last one's; nothing where none is known."""
    return float(np.interp(place, sorted(known), [known[each] for each in sorted(known)])) if known else 0.0


def _in_16_bits(widths: Widths) -> Widths:
    return dataclasses.replace(widths, latent_bits=16, rope_bits=16)


def _ordered(widths: Iterable[Widths]) -> list[Widths]:
    return sorted(widths, key=lambda each: (each.qk_rope_head_dim, each.kv_lora_rank, each.bits))
