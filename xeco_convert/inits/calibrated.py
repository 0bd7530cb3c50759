"""`--init calibrated`: the closed form from the source's activations, widths by sensitivity, and refinement.

The source is gone through layer by layer: once to survey the layers where a rank policy needs all of them, and once to
convert. Beside the source's hidden states go those of the converted model, for regression and for measuring.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.calibration.fidelity import stream_fidelity
from xeco_convert.calibration.sampling import sample_windows
from xeco_convert.calibration.stream import LayerView, SourceStream
from xeco_convert.calibration.survey import Probe, Survey
from xeco_convert.calibration.text import read_windows
from xeco_convert.calibration.windows import LEAST_TOKENS, CalibrationWindows
from xeco_convert.calibration.work import WorkFolder
from xeco_convert.checkpoint import TensorReader
from xeco_convert.errors import XecoWarning
from xeco_convert.evaluate import Fidelity
from xeco_convert.factorize.attention import LayerErrors, MlaAttention, SourceAttention
from xeco_convert.factorize.balance import balance_for_storage
from xeco_convert.factorize.calibrated import CalibratedLayer
from xeco_convert.factorize.forward import latent_inputs, mla_output, source_output
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis
from xeco_convert.factorize.linear_keys import KeyRegression
from xeco_convert.factorize.refit import ValueRefit
from xeco_convert.factorize.statistics import LayerStatistics, StatisticsAccumulator
from xeco_convert.inits.base import ConvertedLayer, Progress, read_attention
from xeco_convert.plan import ConversionPlan, full_rank_of
from xeco_convert.ranks import energy_ranks
from xeco_convert.ranks.budget import Widths, candidate_widths, full_splits, same_widths, split_budget
from xeco_convert.refine import LayerRefinement, RefineOptions

_WINDOW_TOKENS = 512
_MEASURED_WINDOWS = 8
_PROBE_WINDOWS = 32  # for the short regressions of the survey
_PROBE_HELD_OUT = 4
_PROBE_SHARE = 0.05  # of a layer's time, where that is limited, for each of them
_SAMPLING_SHARE = 0.1  # of the work, where text is sampled: for the progress
_CLOSED_FORM_SHARE = 0.2  # of a layer, where it is refined
_BRANCHES_SHARE = 0.3  # of a layer's survey, about
_SURVEY_SHARE = 0.4  # of the rest, where there is a survey


class CalibratedInitialisation:
    """Survey (where needed) and conversion of all layers, on one set of calibration windows."""

    def __init__(
        self,
        plan: ConversionPlan,
        device: torch.device,
        on_progress: Progress,
        *,
        measured_by: CalibratedInitialisation | None = None,
    ) -> None:
        """`measured_by`: another run on the same source and calibration options, whose windows and statistics to use."""
        self._plan = plan
        self._device = device
        self._on_progress = on_progress
        self._reader = TensorReader(plan.index)
        self._surveyed = not plan.ranks_are_final
        self._done = 0.0  # share of the work that the calibration text was
        on_progress("calibration text", 0.0)
        self._work = WorkFolder(plan)
        # windows and statistics do not depend on the widths, factors do
        self._measurements: WorkFolder = self._work if measured_by is None else measured_by._measurements
        self._windows = self._kept_windows()
        self._num_calibrated = self._calibrated_windows()
        self._stream = SourceStream(plan, self._windows, device)
        self._fidelity: Fidelity | None = None
        self._warned: dict[int, str] = {}

    def _calibrated_windows(self) -> int:
        """How many windows to calibrate on: those asked for; the others, or else an eighth of all, are for measuring."""
        found, length = self._windows.ids.shape
        wanted = -(-max(self._plan.options.calibration_tokens, LEAST_TOKENS) // length)
        return wanted if wanted < found else -(-7 * found // 8)

    def final_plan(self) -> ConversionPlan:
        """The plan with ranks by number, by energy of the calibrated spectrum, or by the sensitivity of each layer."""
        options = self._plan.options
        if options.energy is not None:
            self._plan = self._plan.with_widths(self._widths_by_energy(options.energy))
        elif options.has_budget:
            self._plan = self._plan.with_widths(self._widths_by_sensitivity())
        return self._plan

    def layers(self) -> Iterator[ConvertedLayer]:
        """Each converted layer; the converted model's hidden states follow it."""
        first = _SURVEY_SHARE if self._surveyed else 0.0
        converted: Tensor | None = None
        for view in self._stream.layers():
            tell = self._layer_progress("layer", view.number, first, 1.0)
            tell(0.0)
            converted = view.inputs.clone() if converted is None else converted
            factors = None
            if self._plan.layers[view.number].shape is not None:
                layer = self._convert(view, converted, tell)
                factors = layer.factors
                yield layer
            self._advance(view, converted, factors)
            last = view
        assert converted is not None
        measured = slice(self._num_calibrated, None)
        windows = self._windows
        self._tell("measuring", 1.0)
        if windows.counts[measured].any():
            self._fidelity = stream_fidelity(
                self._stream.output_head(),
                last.inputs[measured],
                converted[measured],
                windows.ids[measured],
                last.counts[measured],
            )

    def summary(self) -> dict[str, Any]:
        """Calibration text and step-0 quality."""
        return {
            "calibration": self._windows.description,
            "calibration_tokens": int(self._windows.counts[: self._num_calibrated].sum()),
            "fidelity": None if self._fidelity is None else dataclasses.asdict(self._fidelity),
            **({"warnings": [self._warned[layer] for layer in sorted(self._warned)]} if self._warned else {}),
        }

    def _widths_by_energy(self, energy: float) -> list[Widths]:
        options, spectra, ropes = self._plan.options, [], []
        for view in self._surveyed_views():
            shape = self._plan.layers[view.number].shape
            assert shape is not None
            ropes.append(shape.qk_rope_head_dim)
            source = self._source(view)
            layer = self._calibrated_layer(view, source)
            # energy is a share of squared singular values, which the eigenvalues are
            spectra.append(layer.latent_spectrum(ropes[-1])[: shape.kv_lora_rank].sqrt().cpu().numpy())
        ranks = energy_ranks(spectra, energy, ends=options.rank if options.fixed_ends else None)
        return [Widths(kv_lora_rank=rank, qk_rope_head_dim=rope) for rank, rope in zip(ranks, ropes, strict=True)]

    def _widths_by_sensitivity(self) -> list[Widths]:
        plan, geometry = self._plan, self._plan.geometry
        budget, multiple = plan.kv_budget, plan.rank_multiple
        assert budget is not None
        average = budget / len(plan.converted_layers)
        full_rank = full_rank_of(plan.source, plan.options)
        rotated = max(item.kind.rotary_dim for item in plan.layers if item.shape is not None)
        most_rope = rotated if plan.options.portable else geometry.num_key_value_heads * rotated
        if plan.options.portable:
            offers = full_splits(full_rank, most_rope, multiple, int(average))
        else:
            offers = candidate_widths(full_rank, most_rope, multiple, average)
        survey = Survey(offers, average, plan.converted_layers, self._windows)
        for view in self._surveyed_views(survey):
            source = self._source(view)
            probe = self._probe(view, source) if plan.options.refine else None
            tell = self._survey_progress(view, _BRANCHES_SHARE, 1.0)
            survey.add(view, source, self._calibrated_layer(view, source), probe, tell)
        costs = survey.costs(view.inputs, self._stream.output_head())
        if plan.options.portable:
            return list(same_widths(costs, budget))
        return list(split_budget(costs, budget))

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
        return LayerRefinement(view, source, view.inputs, min(_PROBE_WINDOWS, self._num_calibrated), short).probe

    def _surveyed_views(self, survey: Survey | None = None) -> Iterator[LayerView]:
        """The converted layers of a first pass."""
        for view in self._stream.layers():
            tell = self._survey_progress(view, 0.0, _BRANCHES_SHARE)
            tell(0.0)
            if survey is not None:
                survey.advance_branches(view, tell)
            if self._plan.layers[view.number].shape is not None:
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

    def _source(self, view: LayerView) -> SourceAttention:
        return read_attention(self._plan, self._reader, view.number, self._device)

    def _kept_windows(self) -> CalibrationWindows:
        """The calibration windows, from the work folder where an earlier run left them."""
        kept = self._measurements.load("windows")
        if kept is None:
            windows = _calibration_windows(self._plan, self._device, self._sampling_progress)
            kept = {"ids": windows.ids, "counts": windows.counts, "description": windows.description}
            self._measurements.save("windows", kept)
        return CalibrationWindows(**kept)

    def _sampling_progress(self, share: float) -> None:
        self._done = _SAMPLING_SHARE * share
        self._on_progress("sampling calibration text", self._done)

    @torch.no_grad()
    def _with_linear_keys(self, view: LayerView, source: SourceAttention) -> tuple[SourceAttention, dict[str, Any]]:
        """The layer as the closed form takes it, and what its keys lost by that; itself where its keys are linear already."""
        if source.k_norm_weight is None or self._plan.options.qk_norm == "exact":
            return source, {}
        name = f"keys-{view.number}"
        kept = self._measurements.load(name)
        if kept is None:
            regression = KeyRegression(source)
            first = min(_held_out_from(self._num_calibrated), self._num_calibrated)
            for chosen in (slice(0, first), slice(first, self._num_calibrated)):
                inputs, counts = view.inputs[chosen], view.counts[chosen]
                for part in view.batches(inputs):
                    regression.add(view.normed(inputs[part]), counts[part], held_out=chosen.start > 0)
            found = regression.result()
            errors = {"key_regression_error": found.error, "key_scaling_error": found.prior_error}
            kept = {"weight": found.source.k_weight.cpu(), "bias": found.source.k_bias, "errors": errors}
            self._measurements.save(name, kept)
        bias = None if kept["bias"] is None else kept["bias"].to(self._device)
        return source.with_linear_keys(kept["weight"].to(self._device), bias), kept["errors"]

    @torch.no_grad()
    def _calibrated_layer(self, view: LayerView, source: SourceAttention) -> CalibratedLayer:
        """The layer's closed form, from statistics that are kept from the survey to the conversion."""
        source, _ = self._with_linear_keys(view, source)
        name = f"statistics-{view.number}"
        kept = self._measurements.load(name)
        if kept is None:
            with_inputs = self._plan.options.q_rank is not None
            accumulator = StatisticsAccumulator(source, view.context(), with_inputs=with_inputs)
            for part in view.batches(view.inputs[: self._num_calibrated]):
                accumulator.add(view.normed(view.inputs[part]), view.counts[part])
            kept = vars(accumulator.result().regularised(source))
            self._measurements.save(name, kept)
        statistics = LayerStatistics(**kept).to(self._device)
        self._warn_of_unseen(view.number, statistics)
        return CalibratedLayer(source, statistics, view.softmax_scale, one_per_frequency=self._plan.options.portable)

    def _warn_of_unseen(self, layer: int, statistics: LayerStatistics) -> None:
        """Once for each layer whose statistics needed the ridge."""
        if statistics.unseen == 0 or layer in self._warned:
            return
        self._warned[layer] = (
            f"layer {layer}: the calibration text reaches only {statistics.directions - statistics.unseen} of the "
            f"{statistics.directions} directions of keys and values; a small ridge stands in for the others. "
            "Give more, or more varied, text."
        )
        warnings.warn(self._warned[layer], XecoWarning, stacklevel=2)

    def _convert(self, view: LayerView, converted: Tensor, on_progress: Callable[[float], None]) -> ConvertedLayer:
        name = f"factors-{view.number}"
        source = self._source(view)
        kept = self._work.load(name)
        if kept is None:
            factors, errors, details = self._factorised(view, source, converted, on_progress)
            kept = {"factors": vars(factors), "errors": vars(errors), "details": details}
            self._work.save(name, kept)
        factors = balance_for_storage(MlaAttention(**kept["factors"]), source.num_attention_heads)
        return ConvertedLayer(
            layer=view.number,
            source=self._with_linear_keys(view, source)[0],
            factors=factors.with_tensors({name: t.to(self._device) for name, t in factors.tensors().items()}),
            errors=LayerErrors(**kept["errors"]),
            details=kept["details"],
        )

    def _factorised(
        self, view: LayerView, source: SourceAttention, converted: Tensor, on_progress: Callable[[float], None]
    ) -> tuple[MlaAttention, LayerErrors, dict[str, Any]]:
        """Closed form, refit and, where asked for, regression of one layer."""
        shape = self._plan.layers[view.number].shape
        assert shape is not None
        rank, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
        layer = self._calibrated_layer(view, source)
        exact = layer.factors(rank, rope, q_lora_rank=shape.q_lora_rank, latent_norm=shape.latent_norm)
        closed_form, norm = self._with_steady_norm(view, exact.to(torch.float32))
        factors = self._refitted(view, source, closed_form, converted)
        details: dict[str, Any] = {
            "expected_error": layer.expected_error(rank, rope),
            "closed_form_error": self._error(view, source, closed_form),
            "refitted_error": self._error(view, source, factors),
            "rope_index": list(exact.rope_index or ()),
            "spectrum": layer.latent_spectrum(rope).tolist(),
            **self._with_linear_keys(view, source)[1],
            **norm,
        }
        if self._plan.options.refine:
            tell = lambda share: on_progress(_CLOSED_FORM_SHARE + (1 - _CLOSED_FORM_SHARE) * share)  # noqa: E731
            refined = LayerRefinement(view, source, converted, self._num_calibrated, self._refine_options()).run(
                factors, tell
            )
            factors = refined.factors
            details |= {"refine_errors": refined.errors, "refine_kept": refined.kept}
        return factors, layer.errors(rank, rope), details

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
        options, layers = self._plan.options, len(self._plan.converted_layers)
        minutes = options.refine_minutes
        return RefineOptions(
            steps=options.refine_steps or RefineOptions.steps,
            seconds=None if minutes is None else minutes * 60 / layers,
            seed=options.seed,
        )

    @torch.no_grad()
    def _refitted(
        self, view: LayerView, source: SourceAttention, factors: MlaAttention, converted: Tensor
    ) -> MlaAttention:
        """The value side fitted on the inputs that the converted layers below give, so that it also repairs their errors:
        the target is what leads from there to the source's hidden states after attention."""
        refit = ValueRefit(source, factors, view.context())
        for part in view.batches(view.inputs[: self._num_calibrated]):
            before, inputs = view.inputs[part], converted[part]
            output = source_output(source, view.normed(before), view.context())
            target = view.attention_target(before, output, inputs)
            held_out = part.start >= _held_out_from(self._num_calibrated)
            refit.add(view.normed(inputs), view.counts[part], target_WTX=target, held_out=held_out)
        return refit.result()

    @torch.no_grad()
    def _error(self, view: LayerView, source: SourceAttention, factors: MlaAttention) -> float:
        """Relative squared error of the attention's output, on the windows for measuring where there are any."""
        lost, total = 0.0, 0.0
        context = view.context()
        for part in view.batches(view.inputs):
            if part.stop <= self._num_calibrated and self._num_calibrated < view.inputs.shape[0]:
                continue
            normed, counts = view.normed(view.inputs[part]), view.counts[part]
            target = source_output(source, normed, context)[counts]
            lost += float(
                (mla_output(factors, source.num_attention_heads, normed, context)[counts] - target).square().sum()
            )
            total += float(target.square().sum())
        return lost / total if total > 0 else 0.0

    @torch.no_grad()
    def _advance(self, view: LayerView, converted: Tensor, factors: MlaAttention | None) -> None:
        """Move the converted model's hidden states through its own layer."""
        for part in view.batches(converted):
            inputs = converted[part]
            if factors is None:
                converted[part] = view.run(inputs)
            else:
                heads = self._plan.geometry.num_attention_heads
                attention = mla_output(factors, heads, view.normed(inputs), view.context())
                converted[part] = view.run_with_attention(inputs, attention)


def _held_out_from(num_windows: int) -> int:
    """First of the calibration windows that choose between fits: the last eighth."""
    return num_windows - max(1, num_windows // 8)


def _calibration_windows(
    plan: ConversionPlan, device: torch.device, on_progress: Callable[[float], None]
) -> CalibrationWindows:
    """The windows that the options ask for, and some more for measuring."""
    options = plan.options
    longest = plan.source.values.get("max_position_embeddings")
    length = min(_WINDOW_TOKENS, longest) if isinstance(longest, int) else _WINDOW_TOKENS
    num_tokens = max(options.calibration_tokens, LEAST_TOKENS) + _MEASURED_WINDOWS * length
    if options.calibration is not None:
        return read_windows(options.calibration, plan.index.folder, length=length, num_tokens=num_tokens)
    weights_bytes = sum(header.num_bytes for header in plan.index.headers.values())
    return sample_windows(
        plan.index.folder,
        weights_bytes=weights_bytes,
        length=length,
        num_tokens=num_tokens,
        seed=options.seed,
        device=device,
        on_progress=on_progress,
    )
