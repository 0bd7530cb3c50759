"""`xeco-convert sweep`: what each KV size would cost in quality, measured before deciding, without writing a checkpoint.

Every size goes through the calibrated initialisation as a conversion does; calibration text and statistics are made once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex
from xeco_convert.conversion import device_by_name
from xeco_convert.errors import OptionError
from xeco_convert.initialisation import LayerMaker, Progress
from xeco_convert.options import CACHE_BITS, ConvertOptions
from xeco_convert.plan import ConversionPlan, make_plan
from xeco_convert.report_page import Draw, html_note, html_page, html_plots, html_table
from xeco_convert.settings import parse_share

COLUMNS = ("KV size", "bits", "bytes per token", "of the source", "perplexity", "gap (nats)", "KL (nats)", "top-1")


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One KV size in one number of bits. `fidelity`: perplexities, KL and top-1 before any training, as in a conversion's report;
    `widths`: (kv_lora_rank, qk_rope_head_dim) of each converted layer. Where the size cannot be met, `problem` says why and what
    the smallest possible is, and the rest is None."""

    kv_size: str
    cache_bits: str = "16"
    kv_bytes_per_token: int | None = None
    kv_share: float | None = None
    fidelity: dict[str, Any] | None = None
    widths: tuple[tuple[int, int], ...] = ()
    problem: str | None = None

    @property
    def gap(self) -> float | None:
        """ln(perplexity / source perplexity), nats per token."""
        if self.fidelity is None:
            return None
        return math.log(self.fidelity["perplexity"] / self.fidelity["perplexity_source"])

    @property
    def kl(self) -> float:
        """In nats per token; infinite where nothing was measured."""
        return math.inf if self.fidelity is None else float(self.fidelity["kl"])

    @property
    def name(self) -> str:
        """The size and the bits, in words."""
        return name_of(self.kv_size, self.cache_bits)

    def row(self) -> list[Any]:
        """Cells under COLUMNS; None where nothing is known."""
        size = [self.kv_size, self.cache_bits, self.kv_bytes_per_token, _percent(self.kv_share)]
        if self.fidelity is None:
            return [*size, *(None,) * 4]
        found = self.fidelity
        return [*size, f"{found['perplexity']:.4g}", self.gap, found["kl"], _percent(found["top1"])]


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """All sizes, in the order asked for. `kv_bytes_before`: bytes per token of the source's cache."""

    source: str
    kv_bytes_before: int
    calibration: str
    calibration_tokens: int
    refine: bool
    points: tuple[SweepPoint, ...]

    @property
    def perplexity_source(self) -> float | None:
        """On the same tokens as the points."""
        found = (point.fidelity["perplexity_source"] for point in self.points if point.fidelity is not None)
        return next(found, None)

    def rows(self) -> list[list[Any]]:
        """The table: the source first."""
        perplexity = None if self.perplexity_source is None else f"{self.perplexity_source:.4g}"
        source = ["source", None, self.kv_bytes_before, "100.0%", perplexity, None, None, None]
        return [source, *(point.row() for point in self.points)]

    def problems(self) -> list[str]:
        """A sentence for each size that cannot be met."""
        several = len({point.cache_bits for point in self.points}) > 1
        missed = [point for point in self.points if point.problem is not None]
        return [f"{point.name if several else point.kv_size}: {point.problem}" for point in missed]

    def envelope(self) -> list[SweepPoint]:
        """The points that no other beats in KL with at most as many bytes, smallest first."""
        best: list[SweepPoint] = []
        for point in _by_size(self.points):
            if not best or point.kl < best[-1].kl:
                best.append(point)
        return best

    def setting(self) -> str:
        """How the sizes were measured."""
        refined = "closed form and refinement" if self.refine else "closed form"
        return (
            f"Before any training; {refined}, calibrated on {self.calibration_tokens:,} tokens of: {self.calibration}; "
            "measured on other tokens of the same text."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return dataclasses.asdict(self)


def sweep(
    source: str | Path,
    kv_sizes: Sequence[str],
    options: ConvertOptions,
    *,
    cache_bits: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> SweepReport:
    """Measure the checkpoint `source` at each KV size (texts as 25% or 0.25) in each of `cache_bits` ("16", "8", "4", "3", "2",
    "auto"; None: as `options` say), otherwise converted as `options` say.

    A size that cannot be met becomes a point with a `problem`. Raises the errors of `xeco_convert.errors` where nothing could
    be measured at any size.
    """
    index = CheckpointIndex.open(source, options.revision)
    # the whole cache can always be met: what this refuses would be refused at every size
    whole = make_plan(index, at_size(options, "100%"))
    run = _Sweep(index, options, on_progress or (lambda what, share: None))
    pairs = [(size, bits) for size in kv_sizes for bits in cache_bits or (options.cache_bits,)]
    points = tuple(run.point(*pair, number / len(pairs), 1 / len(pairs)) for number, pair in enumerate(pairs))
    if not run.summary:
        raise OptionError((points and points[0].problem) or "--kv-sizes: no size was given; add some, as 50,25.")
    summary = run.summary
    return SweepReport(
        source=index.hub_id or index.folder.name,
        kv_bytes_before=sum(whole.source_kv_numbers_per_token()) * DTYPE_BYTES[whole.dtype],
        calibration=summary["calibration"],
        calibration_tokens=summary["calibration_tokens"],
        refine=whole.options.values()["refine"],
        points=points,
    )


def parse_sizes(text: str) -> tuple[str, ...]:
    """KV sizes in a list such as 75,50,25 or 75%,50%: numbers above 1 are percent. Each once. Raises `OptionError`."""
    sizes = []
    for part in text.split(","):
        percent = part.strip().endswith("%") or not _above_one(part)
        try:
            share = parse_share(part if percent else f"{part.strip()}%")
        except OptionError:
            raise OptionError(
                f"--kv-sizes: expected percentages such as 75,50,25, at most 100, found {text!r}; change the list."
            ) from None
        sizes.append(f"{100 * share:.10g}%")
    return tuple(dict.fromkeys(sizes))


def name_of(kv_size: str, cache_bits: str) -> str:
    """A size and a number of bits, in words."""
    return f"{kv_size} in {'bits chosen by layer' if cache_bits == 'auto' else f'{cache_bits} bits'}"


def parse_bits(text: str) -> tuple[str, ...]:
    """Numbers of bits in a list such as 16,8,4, each once. Raises `OptionError`."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(CACHE_BITS):
        raise OptionError(f"--cache-bits: expected some of {', '.join(CACHE_BITS)}, found {text!r}; change the list.")
    return names


def sweep_page(report: SweepReport) -> str:
    """The table and the trade-off curve as one HTML page that needs no network."""
    measured = [point for point in report.points if point.fidelity is not None]
    parts = [
        html_table(COLUMNS, report.rows()),
        *(html_note(problem) for problem in report.problems()),
        html_note(report.setting()),
    ]
    plots: list[tuple[str, str, Draw]] = [
        ("perplexity", "Perplexity before any training.", lambda axes: _draw_perplexity(axes, report)),
        (
            "agreement",
            "How often source and converted model agree on the most likely token.",
            lambda axes: _draw_top1(axes, report),
        ),
    ]
    return html_page(f"{report.source}: quality by KV size", [*parts, *(html_plots(plots) if measured else [])])


class _Sweep:
    """Goes through the sizes; the first that can be met makes the statistics for all."""

    def __init__(self, index: CheckpointIndex, options: ConvertOptions, on_progress: Progress) -> None:
        self._index = index
        self._options = options
        self._on_progress = on_progress
        self._device = device_by_name(options.device)
        self.first: LayerMaker | None = None
        self.summary: dict[str, Any] = {}

    def point(self, kv_size: str, cache_bits: str, start: float, share: float) -> SweepPoint:
        """Plan, convert and measure at one size; the progress bar goes on from `start` by `share`."""
        name = kv_size if cache_bits == "16" else name_of(kv_size, cache_bits)
        try:
            plan = make_plan(self._index, at_size(self._options, kv_size, cache_bits))
            tell = lambda what, done: self._on_progress(f"{name}: {what}", start + share * done)  # noqa: E731
            maker = plan.options.initialisation.begin(plan, self._device, tell, measured_by=self.first)
            self.first = self.first or maker
            plan = plan.with_widths_of(maker)
        except OptionError as error:
            return SweepPoint(kv_size=kv_size, cache_bits=cache_bits, problem=str(error))
        for _layer in maker.layers(plan):
            pass  # each is measured as it goes by; none is kept
        self.summary = maker.summary()
        self._on_progress(name, start + share)
        return _point(kv_size, plan, self.summary["fidelity"])


def at_size(options: ConvertOptions, kv_size: str, cache_bits: str = "16") -> ConvertOptions:
    """The options at another KV size, with a work folder of its own: results in a folder are those of one size."""
    work_dir = options.values()["work_dir"]
    name = f"kv-size-{kv_size.rstrip('%')}" + ("" if cache_bits == "16" else f"-{cache_bits}-bits")
    folder = None if work_dir is None else str(Path(work_dir) / name)
    others: dict[str, Any] = {"kv_bytes_per_token": None, "rank": None, "energy": None}
    return options.replace(kv_size=kv_size, cache_bits=cache_bits, work_dir=folder, **others)


def _point(kv_size: str, plan: ConversionPlan, fidelity: dict[str, Any] | None) -> SweepPoint:
    size, before = sum(plan.kv_bytes_per_token()), sum(plan.source_kv_numbers_per_token()) * DTYPE_BYTES[plan.dtype]
    shapes = [item.shape for item in plan.converted]
    return SweepPoint(
        kv_size=kv_size,
        cache_bits=plan.options.cache_bits,
        kv_bytes_per_token=size,
        kv_share=size / before,
        fidelity=fidelity,
        widths=tuple((shape.kv_lora_rank, shape.qk_rope_head_dim) for shape in shapes),
    )


def _by_size(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Those that were measured, smallest first, and of two of one size the better first."""
    measured = [point for point in points if point.fidelity is not None]
    return sorted(measured, key=lambda point: (point.kv_bytes_per_token or 0, point.kl))


def _curves(report: SweepReport) -> dict[str, list[SweepPoint]]:
    """A curve for each number of bits, and what no point beats."""
    bits = list(dict.fromkeys(point.cache_bits for point in report.points))
    if len(bits) == 1:
        return {"converted": _by_size(report.points)}
    curves = {
        f"{name} bits" if name != "auto" else name: _by_size([p for p in report.points if p.cache_bits == name])
        for name in bits
    }
    return curves | {"least KL": report.envelope()}


def _draw_curves(axes: Any, report: SweepReport, figure: str, factor: float) -> list[float]:
    """One line for each curve; all values drawn."""
    drawn = []
    for label, points in _curves(report).items():
        shares = [100 * (point.kv_share or 0.0) for point in points]
        values = [factor * point.fidelity[figure] for point in points if point.fidelity is not None]
        style = {"color": "0.2", "linestyle": ":"} if label == "least KL" else {"marker": "o"}
        axes.plot(shares, values, label=label, **style)
        drawn += values
    axes.grid(visible=True, color="0.9")
    return drawn


def _draw_perplexity(axes: Any, report: SweepReport) -> None:
    perplexities = _draw_curves(axes, report, "perplexity", 1)
    if report.perplexity_source is not None:
        axes.axhline(report.perplexity_source, color="0.4", linestyle="--", label="source")
    if max(perplexities) > 5 * min(perplexities):
        axes.set_yscale("log")
    axes.set(xlabel="KV cache, percent of the source's", ylabel="perplexity")
    axes.legend(frameon=False)


def _draw_top1(axes: Any, report: SweepReport) -> None:
    _draw_curves(axes, report, "top1", 100)
    axes.set(xlabel="KV cache, percent of the source's", ylabel="top-1 agreement, percent")
    if len(_curves(report)) > 1:
        axes.legend(frameon=False)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _above_one(text: str) -> bool:
    try:
        return float(text) > 1
    except ValueError:
        return False
