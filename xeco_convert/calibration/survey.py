"""A first pass over the source that finds what each layer's widths would cost at the model's output.

For every layer: the error of its attention's output at each of the widths on offer, and the KL at the model's output that
converting this layer alone causes. The latter needs no second pass: a copy of a few windows branches off at each layer and
moves through the layers above beside the source's own hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.calibration.fidelity import stream_fidelity
from xeco_convert.calibration.stream import LayerView, OutputHead
from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.factorize.attention import SourceAttention
from xeco_convert.factorize.calibrated import CalibratedLayer
from xeco_convert.factorize.forward import mla_output, source_output
from xeco_convert.ranks.budget import Widths, without_rotation

_BRANCH_TOKENS = 2048  # for the KL at the output
_ERROR_TOKENS = 1024  # for the error of each offer, of which there are many


@dataclass(frozen=True, kw_only=True)
class _Surveyed:
    """One layer: the relative squared output error of every offer, and the offer that its branch was converted at."""

    errors: dict[Widths, float]
    branch: Widths


class Survey:
    """Collects what the budget needs, layer by layer; `costs` is there after the last one.

    `offers`: the widths to measure; `average`: cached numbers per token and layer that the budget allows.
    """

    def __init__(self, offers: Sequence[Widths], average: float, windows: CalibrationWindows) -> None:
        # by rotary width: each takes a decomposition of its own
        self._offers = sorted(offers, key=lambda offer: offer.qk_rope_head_dim)
        self._average = average
        self._windows = windows.first(max(1, _BRANCH_TOKENS // windows.ids.shape[1]))
        self._layers: dict[int, _Surveyed] = {}
        self._branches: dict[int, Tensor] = {}

    @torch.no_grad()
    def advance_branches(self, view: LayerView) -> None:
        """Move the branches of the layers below through this one."""
        for branch in self._branches.values():
            branch.copy_(view.run(branch))

    @torch.no_grad()
    def add(self, view: LayerView, source: SourceAttention, layer: CalibratedLayer) -> None:
        """Survey one layer; called before the view moves on, after `advance_branches`."""
        context, heads = view.context(), source.num_attention_heads
        offers = self._offers if source.rotated else without_rotation(self._offers, source.k_weight.shape[0] * 2)

        def converted(offer: Widths, normed: Tensor) -> Tensor:
            factors = layer.factors(offer.kv_lora_rank, offer.qk_rope_head_dim).to(torch.float32)
            return mla_output(factors, heads, normed, context)

        few = view.normed(view.inputs[: max(1, _ERROR_TOKENS // self._windows.ids.shape[1])])
        target = source_output(source, few, context)
        errors = {
            offer: float((converted(offer, few) - target).square().sum() / target.square().sum()) for offer in offers
        }
        # the branch stands for what this layer will be: the best of those that take the average
        nearest = min(abs(offer.total - self._average) for offer in offers)
        average = [offer for offer in offers if abs(offer.total - self._average) == nearest]
        branch = min(average, key=lambda offer: errors[offer])
        hidden = view.inputs[: self._windows.ids.shape[0]]
        self._branches[view.number] = view.run_with_attention(hidden, converted(branch, view.normed(hidden)))
        self._layers[view.number] = _Surveyed(errors=errors, branch=branch)

    def costs(self, final_hidden: Tensor, head: OutputHead) -> list[dict[Widths, float]]:
        """Expected KL of every offer for each surveyed layer, given the source's final hidden states [W, T, X].

        KL is close to linear in the layer's squared output error (docs/conversion.md, step 6).
        """
        ids, counts = self._windows.ids, self._windows.counts.to(final_hidden.device)
        source = final_hidden[: ids.shape[0]]
        result = []
        for number, layer in self._layers.items():
            kl = stream_fidelity(head, source, self._branches[number], ids, counts).kl
            per_error = max(kl, 0.0) / max(layer.errors[layer.branch], 1e-12)
            result.append({offer: per_error * error for offer, error in layer.errors.items()})
        return result
