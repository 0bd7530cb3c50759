"""`--init paper`: X-EcoMLA as published, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xeco_convert.errors import OptionError
from xeco_convert.initialisation import INITIALISATIONS, ConvertedLayer, Initialisation, LayerMaker, Progress
from xeco_convert.settings import flag_of, option, require, require_at_most
from xeco_convert.stopwatch import Timings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from xeco_convert.factorize import SourceAttention
    from xeco_convert.options import ConvertOptions
    from xeco_convert.plan import ConversionPlan
    from xeco_convert.ranks import Widths
    from xeco_convert.source import SourceModel


@INITIALISATIONS.add
@dataclass(frozen=True, kw_only=True)
class PaperInitialisation(Initialisation):
    """Joint SVD of keys and values, mean rotary key."""

    name = "paper"
    order = 1
    about = "X-EcoMLA as published"
    advice = (
        "This is the published initialisation of X-EcoMLA (arXiv 2503.11132): it is meant to be healed by distillation "
        "(`xeco-distill`) before use, and does not write sensible text until then."
    )
    # the published latent has none of the biases of keys and values: they are added after expansion
    key_value_biases = ("kv_a", "kv_b")

    nope_dim: int | None = option("paper: qk_nope_head_dim, un-rotated width of each head. [head_dim - P]", metavar="N")

    def __post_init__(self) -> None:
        require(
            self.nope_dim is None or self.nope_dim >= 0, "--nope-dim", "a whole number of at least 0", self.nope_dim
        )

    @classmethod
    def refusal(cls, name: str, owners: str) -> str:
        return f"{flag_of(name)}: not with --init paper, which looks at weights alone; leave one of them out."

    def check_source(self, source: SourceModel) -> None:
        """The published initialisation knows linear keys that are rotated over the whole head, with one set of frequencies."""
        family, reason = source.family, None
        if family.has_key_norm:
            reason = "whose keys are normalised, and so not linear in the weights that it factorises"
        elif any(kind.rotary_dim != source.geometry.head_dim for kind in source.kinds) or family.partial_rotary:
            reason = "that does not rotate whole heads in every layer"
        if reason is not None:
            raise OptionError(
                f"--init paper: not for {family.model_type}, {reason}; use --init calibrated, which is the default."
            )

    def head_widths(self, source: SourceModel, options: ConvertOptions, rotary_dim: int) -> tuple[int, int]:
        """`check_source` has refused layers that do not rotate whole heads."""
        dim = source.geometry.head_dim
        require_at_most("--rope-dim", options.rope_dim, dim, "head_dim")
        require_at_most("--nope-dim", self.nope_dim, dim, "head_dim")
        rope_dim = options.rope_dim or max(2, dim // 4 * 2)
        return dim - rope_dim if self.nope_dim is None else self.nope_dim, rope_dim

    def begin(
        self, plan: ConversionPlan, device: torch.device, on_progress: Progress, measured_by: LayerMaker | None = None
    ) -> LayerMaker:
        return _PaperLayers(plan, device, on_progress)


class _PaperLayers:
    """One pass over the layers; two where a policy has to see all spectra first."""

    def __init__(self, plan: ConversionPlan, device: torch.device, on_progress: Progress) -> None:
        from xeco_convert.checkpoint import TensorReader

        self._source = plan.source
        self._converted = [item.layer for item in plan.converted]
        self._device = device
        self._on_progress = on_progress
        self._reader = TensorReader(plan.source.index)
        self._passes = 1 if plan.widths_are_final else 2

    def spectra(self) -> list[NDArray[np.float64]]:
        """Of the joint key/value map."""
        from xeco_convert.factorize.joint_svd import paper_spectrum

        spectra = []
        for done, layer in enumerate(self._converted):
            self._on_progress(f"spectrum of {self._words(layer)}", done / len(self._converted) / self._passes)
            spectra.append(paper_spectrum(self._read(layer)).cpu().numpy())
        return spectra

    def costs(self, offers: Sequence[Widths], average: float) -> list[dict[Widths, float]]:
        """Not measured: `PaperInitialisation.measures_costs` is False."""
        raise NotImplementedError

    def layers(self, plan: ConversionPlan) -> Iterator[ConvertedLayer]:
        """Each layer from its weights."""
        from xeco_convert.factorize.joint_svd import paper_errors, paper_factors
        from xeco_convert.factorize.spread import with_codes

        for done, item in enumerate(plan.converted):
            share = (self._passes - 1 + done / len(plan.converted)) / self._passes
            self._on_progress(self._words(item.layer), share)
            source = self._read(item.layer)
            factors = paper_factors(source, item.shape)
            errors = paper_errors(source, factors, item.shape)
            factors = with_codes(factors, source.num_attention_heads, item.shape.latent_bits, item.shape.rope_bits)
            yield ConvertedLayer(layer=item.layer, source=source, factors=factors, errors=errors)

    def _read(self, layer: int) -> SourceAttention:
        from xeco_convert.source_attention import read_attention

        return read_attention(self._source, self._reader, layer, self._device)

    def _words(self, layer: int) -> str:
        return f"layer {layer + 1} of {self._source.geometry.num_hidden_layers}"

    def summary(self) -> dict[str, Any]:
        """Nothing beyond the layers: this initialisation sees no text."""
        return {}

    def timings(self) -> Timings:
        """It has one part."""
        return {}
