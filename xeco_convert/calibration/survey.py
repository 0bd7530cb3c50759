"""A first pass over the source that finds what each layer's widths would cost at the model's output.

For every layer: the error of its attention's output at each of the widths on offer (output_errors.py), and the KL at the
model's output that converting this layer alone causes. The latter needs no second pass: a copy of a few windows branches off at
a layer and moves through the layers above beside the source's own hidden states. Where the layers will be refined, a short
regression at a few of the widths shows what share of the error refinement leaves: layers differ by more than twice there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from xeco_convert.calibration.output_errors import Share, estimated_errors
from xeco_convert.calibration.stream import LayerView
from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.layer_weights import MlaAttention, SourceAttention
from xeco_convert.factorize.spread import with_codes
from xeco_convert.quality import OutputHead
from xeco_convert.quality.fidelity import stream_divergences
from xeco_convert.ranks import Widths
from xeco_convert.ranks.budget import without_rotation

_BRANCH_TOKENS = 2048  # for the KL at the output
_DEEP = 16  # beyond so many layers half of the windows branch off, and half of each
_KL_TOKENS = 512  # of them whose logits are computed: a vocabulary is most of a small model
MEASURING_TOKENS = 1024  # on which the errors of a layer's widths are measured
_ROUNDING = 1e-12
_MOST_BRANCHES = 32  # each takes hidden states and moves through all layers above: memory and time stay bounded
_MOST_PROBES = 4  # sizes at which a layer is refined for a look
_PROBE_SHARE = 0.6  # of a layer's time that they take, about: for the progress

# What some widths cache per token, in the unit of a budget.
Size = Callable[[Widths], float]
# Refines a layer for a look: the factors, and the share of their error that is left.
Probe = Callable[[MlaAttention], tuple[MlaAttention, float]]


@dataclass(frozen=True, kw_only=True)
class _Surveyed:
    """One layer: the relative squared output error of every offer, and that of its branch; None where it has none."""

    errors: dict[Widths, float]
    branch_error: float | None


class Survey:
    """Collects what the budget needs, layer by layer; `costs` is there after the last one.

    `offers`: the widths to choose among; `average`: what the budget allows a layer, in the unit of `size`, which says what some
    widths cache per token; `layers`: numbers of the layers to survey. Beyond 32 of them only as many, spread evenly,
    get a branch; the price of an error in the others is interpolated between their neighbours.
    """

    def __init__(
        self,
        offers: Sequence[Widths],
        average: float,
        layers: Sequence[int],
        windows: CalibrationWindows,
        size: Size,
    ) -> None:
        self._offers = list(offers)
        self._average = average
        self._size = size
        length, shares = windows.ids.shape[1], 2 if len(layers) > _DEEP else 1
        self._windows = windows.first(max(1, _BRANCH_TOKENS // length // shares), max(1, length // shares))
        numbers = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _MOST_BRANCHES)).round().astype(int))
        self._branching = frozenset(layers[place] for place in numbers)
        self._layers: dict[int, _Surveyed] = {}
        self._branches: dict[int, Tensor] = {}

    @torch.no_grad()
    def advance_branches(self, view: LayerView, on_progress: Share = lambda share: None) -> None:
        """Move the branches of the layers below through this one."""
        for number, branch in enumerate(self._branches.values()):
            on_progress(number / len(self._branches))
            branch.copy_(view.run(branch))

    @torch.no_grad()
    def add(
        self,
        view: LayerView,
        source: SourceAttention,
        layer: CalibratedLayer,
        probe: Probe | None = None,
        on_progress: Share = lambda share: None,
    ) -> None:
        """Survey one layer; called before the view moves on, after `advance_branches`. `probe` where it will be refined."""
        context, heads = view.context(), source.num_attention_heads
        offers = self._offers if source.rotated else without_rotation(self._offers, source.k_weight.shape[0] * 2)
        part = slice(max(0, view.inputs.shape[0] - num_measuring(view.inputs.shape[1])), None)
        few, target, weights = view.normed(view.inputs[part]), view.attention_output[part], view.token_weights(part)

        def factors(offer: Widths) -> MlaAttention:
            closed_form = layer.factors(offer.kv_lora_rank, offer.qk_rope_head_dim).to(torch.float32)
            if offer.bits == (16, 16):
                return closed_form
            energies = layer.energies(offer.kv_lora_rank, offer.qk_rope_head_dim)
            return with_codes(closed_form, heads, *offer.bits, energies)

        def error(offer: Widths) -> float:
            lost = mla_output(factors(offer), heads, few, context) - target
            return float((lost.square() * weights[..., None]).sum() / (target.square() * weights[..., None]).sum())

        of_probes = 0.0 if probe is None else _PROBE_SHARE
        errors = estimated_errors(offers, layer, error, lambda share: on_progress((1 - of_probes) * share))
        # the branch stands for what this layer will be: the best of those that take the average
        branch = best_of_size(errors, self._average, self._size)
        errors[branch] = error(branch)  # the price of all others is taken from it
        branch_factors = factors(branch)
        if probe is not None:
            refined, probed = {}, probed_offers(errors, branch, self._size)
            for number, offer in enumerate(probed):
                on_progress(1 - of_probes * (1 - number / len(probed)))
                refined[offer] = probe(factors(offer))
            branch_factors = refined[branch][0]
            errors = refined_errors(errors, {offer: share for offer, (_, share) in refined.items()}, self._size)
        if view.number in self._branching:
            windows, length = self._windows.ids.shape
            hidden = view.inputs[:windows]
            attention = mla_output(branch_factors, heads, view.normed(hidden), context)
            self._branches[view.number] = view.run_with_attention(hidden[:, :length], attention[:, :length])
        branch_error = errors[branch] if view.number in self._branching else None
        self._layers[view.number] = _Surveyed(errors=errors, branch_error=branch_error)

    def costs(self, final_hidden: Tensor, head: OutputHead) -> list[dict[Widths, float]]:
        """Expected KL of every offer for each surveyed layer, given the source's final hidden states [W, T, X].

        KL is close to linear in the layer's squared output error (docs/conversion.md, step 6).
        """
        counts = self._windows.counts.to(final_hidden.device)
        branches = list(self._branches.values())
        final_hidden = final_hidden[: counts.shape[0], : counts.shape[1]]
        divergences = stream_divergences(head, final_hidden, branches, counts, _KL_TOKENS)
        prices: dict[float, float] = {}
        for number, kl in zip(self._branches, divergences, strict=True):
            error = self._layers[number].branch_error
            assert error is not None, "a layer with a branch has its error"
            # where a branch is exact both are rounding, and still more error costs more
            prices[number] = max(kl, _ROUNDING) / max(error, _ROUNDING)
        return [
            {offer: interpolated(prices, number) * error for offer, error in layer.errors.items()}
            for number, layer in self._layers.items()
        ]


def num_measuring(length: int) -> int:
    """How many windows of `length` tokens errors are measured on: the last ones, which the statistics of a survey leave out."""
    return max(1, MEASURING_TOKENS // length)


def best_of_size(errors: Mapping[Widths, float], size: float, size_of: Size) -> Widths:
    """The offer of least error among those whose size is nearest to `size`."""
    nearest = min(abs(size_of(offer) - size) for offer in errors)
    return min((offer for offer in errors if abs(size_of(offer) - size) == nearest), key=lambda offer: errors[offer])


def probed_offers(errors: Mapping[Widths, float], branch: Widths, size_of: Size) -> list[Widths]:
    """The branch's offer, and the best of a few other sizes from the smallest to the largest."""
    sizes = sorted({size_of(offer) for offer in errors} - {size_of(branch)})
    numbers = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), _MOST_PROBES - 1)).round().astype(int))
    return [branch, *(best_of_size(errors, sizes[place], size_of) for place in numbers if sizes)]


def refined_errors(errors: Mapping[Widths, float], left: Mapping[Widths, float], size_of: Size) -> dict[Widths, float]:
    """Errors after refinement: those of the closed form times the share that it leaves, known at some sizes."""
    by_size = {size_of(offer): share for offer, share in left.items()}
    return {offer: error * interpolated(by_size, size_of(offer)) for offer, error in errors.items()}


def interpolated(known: Mapping[float, float], place: float) -> float:
    """Between the known places in logarithms (linear where one is zero), beyond them the last one's."""
    ordered = sorted(known)
    if place <= ordered[0] or place >= ordered[-1]:
        return known[min(max(place, ordered[0]), ordered[-1])]
    low, high = next(pair for pair in pairwise(ordered) if pair[0] <= place <= pair[1])
    share = (place - low) / (high - low)
    if min(known[low], known[high]) <= 0:
        return (1 - share) * known[low] + share * known[high]
    return math.exp((1 - share) * math.log(known[low]) + share * math.log(known[high]))
