"""`--init calibrated`: the closed form from the source's activations, widths by sensitivity, and refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xeco_convert.errors import OptionError
from xeco_convert.initialisation import INITIALISATIONS, Initialisation, LayerMaker, Progress
from xeco_convert.settings import option, require, require_at_most

if TYPE_CHECKING:
    import torch

    from xeco_convert.options import ConvertOptions
    from xeco_convert.plan import ConversionPlan
    from xeco_convert.source import SourceModel

_MOST_ROPE_DIM = 64  # by default


@INITIALISATIONS.add
@dataclass(frozen=True, kw_only=True)
class CalibratedInitialisation(Initialisation):
    """Closed form on calibration text; with `refine`, regression of each layer."""

    name = "calibrated"
    order = 0
    about = "closed form from the model's activations"
    advice = "Factors in closed form from the source's own activations (xeco-convert's calibrated initialisation)."
    measures_costs = True

    calibration: str | None = option(
        "Text to calibrate on: .txt, .md, .jsonl, .json, .csv, .tsv (also .gz), .parquet, or a data set's name. "
        "[sampled from the source model]",
        metavar="TEXT",
    )
    calibration_tokens: int = option("Tokens to calibrate on.", 16384, metavar="N")
    refine: bool = option(
        "Regress each layer on the source's outputs after the closed form: minutes, much better.", False, recorded=True
    )
    refine_steps: int | None = option("With --refine: steps for each layer. [200]", metavar="N")
    refine_minutes: float | None = option(
        "With --refine: stop starting layers' regressions after this time.", metavar="M"
    )
    work_dir: str | None = option(
        "Keep calibration results here, and continue from them after an interruption.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        tokens = self.calibration_tokens
        require(tokens >= 1, "--calibration-tokens", "a positive whole number", tokens)
        for flag, value in (("--refine-steps", self.refine_steps), ("--refine-minutes", self.refine_minutes)):
            require(value is None or value > 0, flag, "a positive number", value)
            if value is not None and not self.refine:
                raise OptionError(f"{flag}: only with --refine; add it, or leave {flag} out.")

    @classmethod
    def refusal(cls, name: str, owners: str) -> str:
        if name == "nope_dim":
            return "--nope-dim: only with --init paper; the calibrated initialisation keeps whole un-rotated queries."
        return super().refusal(name, owners)

    def when_interrupted(self) -> str:
        if self.work_dir is None:
            return ". With --work-dir FOLDER finished layers are kept, and the same command goes on from them."
        return f"; what was finished is kept in {self.work_dir}, and the same command continues from there."

    def check_source(self, source: SourceModel) -> None:
        """Every family can be calibrated."""

    def head_widths(self, source: SourceModel, options: ConvertOptions, rotary_dim: int) -> tuple[int, int]:
        # a NoPE layer takes part in no check of the rotary width
        rotary_rows = (rotary_dim or source.geometry.head_dim) * (
            1 if options.portable else source.geometry.num_key_value_heads
        )
        require_at_most("--rope-dim", options.rope_dim, rotary_rows, "all rotary rows")
        most = source.family.portable_rotary_dim(source.values) if options.portable else rotary_rows
        rope_dim = options.rope_dim or min(_MOST_ROPE_DIM, most, rotary_rows)
        return source.geometry.head_dim, rope_dim if rotary_dim else 0

    def begin(
        self,
        plan: ConversionPlan,
        device: torch.device,
        on_progress: Progress,
        measured_by: LayerMaker | None = None,
    ) -> LayerMaker:
        from xeco_convert.inits.calibrated.layers import CalibratedLayers

        earlier = measured_by if isinstance(measured_by, CalibratedLayers) else None
        return CalibratedLayers(self, plan, device, on_progress, measured_by=earlier)
