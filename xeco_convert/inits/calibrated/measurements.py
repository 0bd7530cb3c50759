"""What is measured of the source: calibration windows, statistics of each layer, linear keys. None of it depends on widths.

All is kept in the work folder, from the survey to the conversion, from one size of a sweep to the next, and after an
interruption.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from xeco_convert.calibration.stream import BATCH_WINDOWS, LayerView, SourceStream
from xeco_convert.calibration.survey import num_measuring
from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.calibration.work import WorkFolder
from xeco_convert.checkpoint import TensorReader
from xeco_convert.errors import XecoWarning
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.layer_weights import SourceAttention
from xeco_convert.factorize.linear_keys import KeyRegression
from xeco_convert.factorize.statistics import LayerStatistics, StatisticsAccumulator
from xeco_convert.inits.calibrated.windows import calibration_windows, held_out_from, num_calibrated
from xeco_convert.plan import ConversionPlan
from xeco_convert.source_attention import read_attention

if TYPE_CHECKING:
    from xeco_convert.inits.calibrated import CalibratedInitialisation


_TOKENS_OF_A_DIRECTION = 8  # of keys and values, that a survey looks at


class Measurements:
    """The measurements of one source, made where they are not in `work` yet. `num_calibrated`: how many of the windows are
    calibrated on; the others are for measuring."""

    def __init__(
        self,
        settings: CalibratedInitialisation,
        plan: ConversionPlan,
        device: torch.device,
        work: WorkFolder,
        on_sampling: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._device = device
        self._work = work
        self._reader = TensorReader(plan.source.index)
        self.windows = self._load_windows(settings, on_sampling)
        self.num_calibrated = num_calibrated(self.windows, settings)
        self.stream = SourceStream(plan.source, self.windows, device)
        self._warnings: dict[int, str] = {}

    @property
    def warnings(self) -> list[str]:
        """What was warned of, layer by layer."""
        return [self._warnings[layer] for layer in sorted(self._warnings)]

    @property
    def held_out_from(self) -> int:
        """First of the calibrated windows that choose between fits."""
        return held_out_from(self.num_calibrated)

    @property
    def num_surveyed(self) -> int:
        """Of the calibrated windows, how many a survey looks at: half of them, or as many as the directions of keys and values
        want, and a few on which it measures; all where they are needed as a whole, for linear keys and a look at refinement."""
        options, geometry = self._plan.options, self._plan.source.geometry
        regression = self._plan.source.family.has_key_norm and options.qk_norm == "regression"
        wanted = -(-_TOKENS_OF_A_DIRECTION * geometry.cache_width // self.windows.ids.shape[1])
        whole = -(-max(wanted, self.num_calibrated // 2) // BATCH_WINDOWS) * BATCH_WINDOWS + self.num_measuring
        return self.num_calibrated if regression or self._settings.refine else min(whole, self.num_calibrated)

    @property
    def num_measuring(self) -> int:
        """The last ones that a survey looks at: errors are measured on them."""
        return num_measuring(self.windows.ids.shape[1])

    def _load_windows(
        self, settings: CalibratedInitialisation, on_sampling: Callable[[float], None]
    ) -> CalibrationWindows:
        stored = self._work.load("windows")
        if stored is None:
            windows = calibration_windows(
                self._plan.source, settings, self._plan.options.seed, self._device, on_sampling
            )
            stored = {"ids": windows.ids, "counts": windows.counts, "description": windows.description}
            self._work.save("windows", stored)
        return CalibrationWindows(**stored)

    def source(self, view: LayerView) -> SourceAttention:
        """The layer's own attention weights."""
        return read_attention(self._plan.source, self._reader, view.number, self._device)

    @torch.no_grad()
    def with_linear_keys(self, view: LayerView, source: SourceAttention) -> tuple[SourceAttention, dict[str, Any]]:
        """The layer as the closed form takes it, and what its keys lost by that; itself where its keys are linear already."""
        if source.k_norm_weight is None or self._plan.options.qk_norm == "exact":
            return source, {}
        name = f"keys-{view.number}"
        stored = self._work.load(name)
        if stored is None:
            regression = KeyRegression(source)
            first = min(self.held_out_from, self.num_calibrated)
            for part_of_text in (slice(0, first), slice(first, self.num_calibrated)):
                inputs, counts = view.inputs[part_of_text], view.counts[part_of_text]
                for part in view.batches(inputs):
                    regression.add(view.normed(inputs[part]), counts[part], held_out=part_of_text.start > 0)
            result = regression.result()
            errors = {"key_regression_error": result.error, "key_scaling_error": result.prior_error}
            stored = {"weight": result.source.k_weight.cpu(), "bias": result.source.k_bias, "errors": errors}
            self._work.save(name, stored)
        bias = None if stored["bias"] is None else stored["bias"].to(self._device)
        return source.with_linear_keys(stored["weight"].to(self._device), bias), stored["errors"]

    @torch.no_grad()
    def calibrated_layer(self, view: LayerView, source: SourceAttention) -> CalibratedLayer:
        """The layer's closed form, by all calibrated windows; in a survey of fewer by those that nothing is measured on."""
        source, _ = self.with_linear_keys(view, source)
        in_survey = view.inputs.shape[0] < self.num_calibrated
        # apart, so that a run that goes on surveys what it did before
        name, earlier = f"statistics-{view.number}", f"surveyed-{view.number}"
        stored = self._work.load(earlier if in_survey else name)
        if stored is None:
            stored = self._statistics(view, source, None if in_survey else self._work.load(earlier))
            self._work.save(earlier if in_survey else name, stored)
        statistics = LayerStatistics(**stored["statistics"]).to(self._device)
        if not in_survey:
            self._warn_of_unseen(view.number, statistics)
        portable = self._plan.options.portable
        return CalibratedLayer(source, statistics, view.softmax_scale, one_per_frequency=portable)

    def _statistics(self, view: LayerView, source: SourceAttention, surveyed: dict[str, Any] | None) -> dict[str, Any]:
        """`statistics` of the view's calibrated windows, what was `surveyed` and those that this leaves out; of a survey also
        their `sums`, and how many `windows` they are of."""
        accumulator = StatisticsAccumulator(source, view.context(), with_inputs=self._plan.options.q_rank is not None)
        first, windows = 0, self.num_calibrated
        if view.inputs.shape[0] < windows:
            windows = view.inputs.shape[0] - self.num_measuring
        if surveyed is not None:
            accumulator.restore(surveyed["sums"])
            first = surveyed["windows"]
        for part in view.batches(view.inputs[:windows]):
            if part.start >= first:
                accumulator.add(view.normed(view.inputs[part]), view.counts[part])
        found: dict[str, Any] = {"statistics": vars(accumulator.result().regularised(source))}
        return found if windows == self.num_calibrated else {**found, "sums": accumulator.sums(), "windows": windows}

    def _warn_of_unseen(self, layer: int, statistics: LayerStatistics) -> None:
        """Once for each layer whose statistics needed the ridge."""
        if statistics.unseen == 0 or layer in self._warnings:
            return
        self._warnings[layer] = (
            f"layer {layer}: the calibration text reaches only {statistics.directions - statistics.unseen} of the "
            f"{statistics.directions} directions of keys and values; a small ridge stands in for the others. "
            "Give more, or more varied, text."
        )
        warnings.warn(self._warnings[layer], XecoWarning, stacklevel=2)
