"""`--init paper`: X-EcoMLA as published, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from xeco_convert.checkpoint import TensorReader
from xeco_convert.factorize.paper import paper_errors, paper_factors, paper_spectrum
from xeco_convert.inits.base import ConvertedLayer, Progress, read_attention
from xeco_convert.plan import ConversionPlan
from xeco_convert.ranks import energy_ranks
from xeco_convert.ranks.budget import Widths


class PaperInitialisation:
    """One pass over the layers; two where --energy has to see all spectra first."""

    def __init__(self, plan: ConversionPlan, device: torch.device, on_progress: Progress) -> None:
        self._plan = plan
        self._device = device
        self._on_progress = on_progress
        self._reader = TensorReader(plan.index)
        self._passes = 1 if plan.ranks_are_final else 2

    def final_plan(self) -> ConversionPlan:
        """The plan with ranks by number, or by energy."""
        options = self._plan.options
        if options.energy is None:
            return self._plan
        spectra = []
        for done, layer in enumerate(self._plan.converted_layers):
            self._on_progress(
                f"spectrum of {self._place(layer)}", done / len(self._plan.converted_layers) / self._passes
            )
            source = read_attention(self._plan, self._reader, layer, self._device)
            spectra.append(paper_spectrum(source).cpu().numpy())
        ranks = energy_ranks(spectra, options.energy, ends=options.rank if options.fixed_ends else None)
        shapes = [self._plan.layers[layer].shape for layer in self._plan.converted_layers]
        widths = [
            Widths(kv_lora_rank=rank, qk_rope_head_dim=shape.qk_rope_head_dim)
            for rank, shape in zip(ranks, shapes, strict=True)
            if shape is not None
        ]
        self._plan = self._plan.with_widths(widths)
        return self._plan

    def layers(self) -> Iterator[ConvertedLayer]:
        """Each layer from its weights."""
        count = len(self._plan.converted_layers)
        for done, layer in enumerate(self._plan.converted_layers):
            self._on_progress(self._place(layer), (self._passes - 1 + done / count) / self._passes)
            shape = self._plan.layers[layer].shape
            assert shape is not None
            source = read_attention(self._plan, self._reader, layer, self._device)
            factors = paper_factors(source, shape)
            yield ConvertedLayer(
                layer=layer, source=source, factors=factors, errors=paper_errors(source, factors, shape)
            )

    def _place(self, layer: int) -> str:
        return f"layer {layer + 1} of {len(self._plan.layers)}"

    def summary(self) -> dict[str, Any]:
        """Nothing beyond the layers: this initialisation sees no text."""
        return {}
