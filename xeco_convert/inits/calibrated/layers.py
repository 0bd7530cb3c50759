"""The layers of `--init calibrated`: survey where a policy needs it, closed form, refit, refinement, measuring.

The source is gone through layer by layer: once to survey the layers where a rank policy needs all of them, and once to
convert. Beside the source's hidden states go those of the converted model, for regression and for measuring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from xeco_convert.calibration.stream import LayerView
from xeco_convert.calibration.survey import Probe, Survey
from xeco_convert.calibration.work import WorkFolder
from xeco_convert.factorize.attention import attended_output, latent_inputs, mla_attended
from xeco_convert.factorize.balance import balance_for_storage
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis
from xeco_convert.factorize.layer_weights import LayerErrors, MlaAttention, SourceAttention
from xeco_convert.factorize.refit import ValueRefit
from xeco_convert.factorize.spread import with_codes
from xeco_convert.initialisation import ConvertedLayer, Progress
from xeco_convert.inits.calibrated.key_weight import weighed_layer
from xeco_convert.inits.calibrated.measurements import Measurements
from xeco_convert.modeling.layer_xeco import MlaShape
from xeco_convert.plan import ConversionPlan
from xeco_convert.quality import Fidelity
from xeco_convert.quality.fidelity import stream_fidelity
from xeco_convert.ranks import Widths
from xeco_convert.refine import LayerRefinement, RefineOptions
from xeco_convert.stopwatch import Stopwatch, Timings

if TYPE_CHECKING:
    from xeco_convert.inits.calibrated import CalibratedInitialisation

_PROBE_WINDOWS = 32  # for the short regressions of the survey
_PROBE_HELD_OUT = 4
_PROBE_SHARE = 0.05  # of a layer's time, where that is limited, for each of them
_SAMPLING_SHARE = 0.1  # of the work, where text is sampled: for the progress
_CLOSED_FORM_SHARE = 0.2  # of a layer, where it is refined
_BRANCHES_SHARE = 0.3  # of a layer's survey, about
_SURVEY_SHARE = 0.4  # of the rest, where there is a survey
_MOST_ATTENDED = 2**29  # bytes of attended latents that are kept from the refit, which would be computed again


class CalibratedLayers:
    """Survey (where needed) and conversion of all layers, on one set of calibration windows."""

    def __init__(
        self,
        settings: CalibratedInitialisation,
        plan: ConversionPlan,
        device: torch.device,
        on_progress: Progress,
        *,
        measured_by: CalibratedLayers | None = None,
    ) -> None:
        """`measured_by`: another run on the same source and calibration options, whose windows and statistics to use."""
        self._settings = settings
        self._plan = plan
        self._device = device
        self._on_progress = on_progress
        self._surveyed = not plan.widths_are_final
        self._done = 0.0  # share of the work that the calibration text was
        self._watch = Stopwatch()
        on_progress("calibration text", 0.0)
        self._work = WorkFolder(settings.work_dir, plan.source.index, plan.options)
        # windows and statistics do not depend on the widths, factors do
        with self._watch.part("calibration text"):
            self._measurements: Measurements = (
                Measurements(settings, plan, device, self._work, self._sampling_progress)
                if measured_by is None
                else measured_by._measurements
            )
        self._windows = self._measurements.windows
        self._num_calibrated = self._measurements.num_calibrated
        self._fidelity: Fidelity | None = None
        self._key_weights: dict[int, float] = {}  # by layer, once they are chosen
        # what the attention of the layer in hand puts out on the calibrated windows, where that is known
        self._attention: Tensor | None = None

    def spectra(self) -> list[NDArray[np.float64]]:
        """Of the calibrated latents: an energy is a share of squared singular values, which their eigenvalues are."""
        spectra = []
        bounds = {item.layer: item.shape for item in self._plan.converted}
        for view in self._surveyed_views(self._num_calibrated):
            bound = bounds[view.number]
            layer = self._measurements.calibrated_layer(view, self._measurements.source(view))
            spectrum = layer.latent_spectrum(bound.qk_rope_head_dim)[: bound.kv_lora_rank]
            spectra.append(spectrum.sqrt().cpu().numpy())
        return spectra

    def costs(self, offers: Sequence[Widths], average: float) -> list[dict[Widths, float]]:
        """By the sensitivity of each layer, and what refinement would leave of its error."""
        size = self._plan.cache_facts.layer_bytes
        num_windows = self._measurements.num_surveyed
        layers, windows = [item.layer for item in self._plan.converted], self._windows.first(num_windows)
        survey = Survey(offers, average, layers, windows, size)
        for view in self._surveyed_views(num_windows, survey):
            source = self._measurements.source(view)
            probe = self._probe(view, source) if self._settings.refine else None
            tell = self._survey_progress(view, _BRANCHES_SHARE, 1.0)
            middle = min(offers, key=lambda offer: abs(size(offer) - average))
            layer = self._weighed(view, source, middle)
            with self._watch.part("survey"):
                survey.add(view, source, layer, probe, tell)
        with self._watch.part("survey"):
            return survey.costs(view.outputs, self._measurements.stream.output_head())

    def layers(self, plan: ConversionPlan) -> Iterator[ConvertedLayer]:
        """Each converted layer; the converted model's hidden states follow it."""
        self._plan = plan
        shapes = {item.layer: item.shape for item in plan.converted}
        first = _SURVEY_SHARE if self._surveyed else 0.0
        converted: Tensor | None = None
        for view in self._watch.each("source", self._measurements.stream.layers()):
            tell = self._layer_progress("layer", view.number, first, 1.0)
            tell(0.0)
            converted = view.inputs.clone() if converted is None else converted
            factors = self._attention = None
            if view.number in shapes:
                layer = self._convert(view, shapes[view.number], converted, tell)
                factors = layer.factors
                yield layer
            with self._watch.part("converted model"):
                view.advance(converted, factors, plan.source.geometry.num_attention_heads, known=self._attention)
            last = view
        assert converted is not None, "a model has layers"
        with self._watch.part("measuring"):
            self._measure(last, converted)

    def _measure(self, last: LayerView, converted: Tensor) -> None:
        """Step-0 quality on the windows that were not calibrated on, given the hidden states behind the last layer."""
        measured, windows = slice(self._num_calibrated, None), self._windows
        self._tell("measuring", 1.0)
        if windows.counts[measured].any():
            self._fidelity = stream_fidelity(
                self._measurements.stream.output_head(),
                last.outputs[measured],
                converted[measured],
                windows.ids[measured],
                last.counts[measured],
            )

    def summary(self) -> dict[str, Any]:
        """Calibration text and step-0 quality."""
        summary: dict[str, Any] = {
            "calibration": self._windows.description,
            "calibration_tokens": int(self._windows.counts[: self._num_calibrated].sum()),
            "fidelity": None if self._fidelity is None else dataclasses.asdict(self._fidelity),
        }
        return summary | ({"warnings": self._measurements.warnings} if self._measurements.warnings else {})

    def timings(self) -> Timings:
        """By the parts of the work."""
        return self._watch.timings()

    def _probe(self, view: LayerView, source: SourceAttention) -> Probe:
        """A short regression on the source's own hidden states, to see what refinement will make of some widths."""
        options = self._refine_options()
        seconds = None if options.seconds is None else options.seconds * _PROBE_SHARE
        short = dataclasses.replace(
            options,
            steps=max(1, options.steps // 5),
            batch_tokens=options.batch_tokens // 2,
            held_out_windows=_PROBE_HELD_OUT,
            seconds=seconds,
        )
        return LayerRefinement(
            view, source.num_attention_heads, view.inputs, min(_PROBE_WINDOWS, self._num_calibrated), short
        ).probe

    def _surveyed_views(self, num_windows: int, survey: Survey | None = None) -> Iterator[LayerView]:
        """The converted layers of the source on its first windows, one after the other; the branches of `survey` move through all
        layers."""
        converted = {item.layer for item in self._plan.converted}
        for view in self._watch.each("source", self._measurements.stream.layers(num_windows)):
            tell = self._survey_progress(view, 0.0, _BRANCHES_SHARE)
            tell(0.0)
            if survey is not None:
                with self._watch.part("survey"):
                    survey.advance_branches(view, tell)
            if view.number in converted:
                yield view

    def _tell(self, what: str, share: float) -> None:
        """Progress of what follows the calibration text."""
        self._on_progress(what, self._done + (1 - self._done) * share)

    def _layer_progress(self, what: str, number: int, start: float, end: float) -> Callable[[float], None]:
        """Takes the share done of a layer, in a pass over the layers from `start` to `end` of the whole."""
        count = len(self._plan.layers)
        words = f"{what} {number + 1} of {count}"
        return lambda share: self._tell(words, start + (end - start) * (number + share) / count)

    def _survey_progress(self, view: LayerView, start: float, end: float) -> Callable[[float], None]:
        """Takes the share done of one part of a layer's survey, from `start` to `end` of it."""
        tell = self._layer_progress("survey of layer", view.number, 0.0, _SURVEY_SHARE)
        return lambda share: tell(start + (end - start) * share)

    def _sampling_progress(self, share: float) -> None:
        self._done = _SAMPLING_SHARE * share
        self._on_progress("sampling calibration text", self._done)

    def _convert(
        self, view: LayerView, shape: MlaShape, converted: Tensor, on_progress: Callable[[float], None]
    ) -> ConvertedLayer:
        name = f"factors-{view.number}"
        source = self._measurements.source(view)
        stored = self._work.load(name)
        if stored is None:
            factors, errors, details = self._factorised(view, shape, source, converted, on_progress)
            stored = {"factors": vars(factors), "errors": vars(errors), "details": details}
            self._work.save(name, stored)
        factors = balance_for_storage(MlaAttention(**stored["factors"]), source.num_attention_heads)
        return ConvertedLayer(
            layer=view.number,
            source=self._measurements.with_linear_keys(view, source)[0],
            factors=factors.with_tensors({name: t.to(self._device) for name, t in factors.tensors().items()}),
            errors=LayerErrors(**stored["errors"]),
            details=stored["details"],
        )

    def _factorised(
        self,
        view: LayerView,
        shape: MlaShape,
        source: SourceAttention,
        converted: Tensor,
        on_progress: Callable[[float], None],
    ) -> tuple[MlaAttention, LayerErrors, dict[str, Any]]:
        """Closed form, refit and, where asked for, regression of one layer."""
        rank, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
        layer = self._weighed(view, source, Widths(kv_lora_rank=rank, qk_rope_head_dim=rope))
        with self._watch.part("closed form"):
            exact = layer.factors(rank, rope, q_lora_rank=shape.q_lora_rank, latent_norm=shape.latent_norm)
            closed_form, norm = self._with_steady_norm(view, exact.to(torch.float32))
            if shape.is_packed:
                bits, energies = (shape.latent_bits, shape.rope_bits), layer.energies(rank, rope)
                closed_form = with_codes(closed_form, source.num_attention_heads, *bits, energies)
        with self._watch.part("refit"):
            factors, self._attention = self._refitted(view, source.num_attention_heads, closed_form, converted)
        with self._watch.part("measuring"):
            closed_form_error, refitted_error = self._errors(view, source.num_attention_heads, closed_form, factors)
        details: dict[str, Any] = {
            "key_weight": layer.key_weight,
            "expected_error": layer.expected_error(rank, rope),
            "closed_form_error": closed_form_error,
            "refitted_error": refitted_error,
            "rope_index": list(exact.rope_index or ()),
            "spectrum": layer.latent_spectrum(rope).tolist(),
            **self._measurements.with_linear_keys(view, source)[1],
            **norm,
        }
        if self._settings.refine:
            tell = lambda share: on_progress(_CLOSED_FORM_SHARE + (1 - _CLOSED_FORM_SHARE) * share)  # noqa: E731
            refinement = LayerRefinement(
                view, source.num_attention_heads, converted, self._num_calibrated, self._refine_options()
            )
            with self._watch.part("refinement"):
                refined = refinement.run(factors, tell)
            factors, self._attention = refined.factors, None
            details |= {"refine_errors": refined.errors, "refine_kept": refined.kept}
        return factors, layer.errors(rank, rope), details

    def _weighed(self, view: LayerView, source: SourceAttention, widths: Widths) -> CalibratedLayer:
        """The closed form of a layer, with keys weighed for these widths, or for those of the survey where there was one; what a
        NoPE layer does not rotate is latent."""
        if not source.rotated:
            widths = Widths(kv_lora_rank=widths.total, qk_rope_head_dim=0)
        with self._watch.part("closed form"):
            if view.number in self._key_weights:
                layer = self._measurements.calibrated_layer(view, source)
                return layer.with_key_weight(self._key_weights[view.number])
            layer = weighed_layer(self._measurements, view, source, widths)
            self._key_weights[view.number] = layer.key_weight
            return layer

    @torch.no_grad()
    def _with_steady_norm(self, view: LayerView, factors: MlaAttention) -> tuple[MlaAttention, dict[str, Any]]:
        """The latent in the basis that its norm changes least, and how much it still does; nothing without a norm."""
        if factors.latent_norm_weight is None:
            return factors, {}
        rank = factors.kv_b_weight.shape[1]
        bias = None if factors.kv_a_bias is None else factors.kv_a_bias[:rank]
        latents = []
        for part in view.batches(view.inputs[: self._num_calibrated]):
            counted = view.normed(view.inputs[part])[view.counts[part]]
            inputs = latent_inputs(factors, counted, view.context())
            latents.append(functional.linear(inputs, factors.kv_a_weight[:rank], bias))
        basis = steady_basis(torch.cat(latents), seed=self._plan.options.seed)
        details = {"latent_norm_variation": basis.variation, "latent_norm_variation_before": basis.before}
        return with_steady_basis(factors, basis), details

    def _refine_options(self) -> RefineOptions:
        minutes = self._settings.refine_minutes
        return RefineOptions(
            steps=self._settings.refine_steps or RefineOptions.steps,
            seconds=None if minutes is None else minutes * 60 / len(self._plan.converted),
            seed=self._plan.options.seed,
        )

    @torch.no_grad()
    def _refitted(
        self, view: LayerView, heads: int, factors: MlaAttention, converted: Tensor
    ) -> tuple[MlaAttention, Tensor | None]:
        """The value side fitted on the inputs that the converted layers below give, so that it also repairs their errors:
        the target is what leads from there to the source's hidden states after attention. And what the fitted layer puts out on
        the calibrated windows [W, T, X]; None where keeping what it attends to would take too much."""
        refit, kept = ValueRefit(factors, heads, view.context()), []
        num_bytes = 4 * heads * factors.kv_b_weight.shape[1] * converted[: self._num_calibrated, :, 0].numel()
        for part in view.batches(view.inputs[: self._num_calibrated]):
            inputs = converted[part]
            target = view.attention_target(part, inputs)
            held_out = part.start >= self._measurements.held_out_from
            weights = view.token_weights(part)
            attended = refit.add(view.normed(inputs), view.counts[part], target, weights, held_out=held_out)
            if num_bytes <= _MOST_ATTENDED:
                kept.append(attended)
        fitted = refit.result()
        return fitted, torch.cat([attended_output(fitted, attended) for attended in kept]) if kept else None

    @torch.no_grad()
    def _errors(self, view: LayerView, heads: int, *layers: MlaAttention) -> list[float]:
        """Relative squared errors of the attention's output, tokens by `LayerView.token_weights`, on the windows for measuring
        where there are any. `layers` differ in their value side alone: all attend alike."""
        lost, total = [0.0] * len(layers), 0.0
        for part in view.batches(view.inputs):
            if part.stop <= self._num_calibrated and self._num_calibrated < view.inputs.shape[0]:
                continue
            weights, target = torch.where(view.counts[part], view.token_weights(part), 0.0), view.attention_output[part]
            attended = mla_attended(layers[0], heads, view.normed(view.inputs[part]), view.context())
            for number, layer in enumerate(layers):
                squares = (attended_output(layer, attended) - target).square().sum(dim=-1)
                lost[number] += float((squares * weights).sum())
            total += float((target.square().sum(dim=-1) * weights).sum())
        return [each / total if total > 0 else 0.0 for each in lost]
