"""The report of a conversion as one HTML page that needs no network: tables, and plots where matplotlib is installed.

The same report gives the same bytes: no dates, no random ids, matplotlib's own defaults whatever the user has configured.
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from xeco_convert.report import ConversionReport, LayerReport, format_cell

# What a plot is drawn by: gets matplotlib's Axes (Any, because matplotlib may be missing).
Draw = Callable[[Any], None]

_NO_PLOTS = "Plots need matplotlib: pip install 'xeco-convert[report]', then convert once more."
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; max-width: 62em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: #555; max-width: 46em; }
.note { color: #555; }
"""
_MOST_POINTS = 200  # of each spectrum: a curve looks the same, and the page stays small
_MOST_LABELS = 6
_REFINE_STAGES = ("start", "refit", "scores", "regression")
_EXPECTED_AND_MEASURED = (
    ("expected_error", "expected"),
    ("closed_form_error", "closed form, measured"),
    ("refitted_error", "after the refit, measured"),
)


def report_page(report: ConversionReport) -> str:
    """The page. Tables of whatever the report holds; plots of what its layers' details hold."""
    source = report.source or report.model_type.removeprefix("xeco_")
    title = f"{source}: conversion to latent attention"
    parts = [
        html_table(("", "source", "converted"), _summary_rows(report)),
        _setting(report),
        "<h2>Layers</h2>",
        html_table(*_layer_table(report.layers)),
        _legend(report.layers),
        *_plots(report.layers),
    ]
    return html_page(title, parts)


def html_page(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts that are HTML already; the title is text."""
    heading = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers, escaped; None is an empty cell."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(format_cell(value))}</td>" for value in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def html_note(text: str) -> str:
    """A remark below a table or in place of a plot."""
    return f'<p class="note">{html.escape(text)}</p>'


def html_plots(plots: Sequence[tuple[str, str, Draw]]) -> list[str]:
    """Figures of (name, caption, draw), as inline SVG; one line that says how to get them where matplotlib is missing."""
    if not plots:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        return [html_note(_NO_PLOTS)]
    return [_figure(name, caption, draw) for name, caption, draw in plots]


def step0_rows(fidelity: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """(what, source, converted) for each figure of step-0 quality, as text; nothing where it was not measured."""
    if not fidelity:
        return []
    return [
        ("step-0 perplexity", f"{fidelity['perplexity_source']:.4g}", f"{fidelity['perplexity']:.4g}"),
        ("KL(source ‖ converted), nats per token", "0", f"{fidelity['kl']:.4g}"),
        ("top-1 agreement", "100.0%", f"{fidelity['top1']:.1%}"),
    ]


def _summary_rows(report: ConversionReport) -> list[tuple[str, str, str]]:
    size = f"{report.kv_bytes_after:,} ({report.kv_share:.1%})"
    return [
        ("KV cache, bytes per token", f"{report.kv_bytes_before:,}", size),
        ("parameters", f"{report.parameters_before:,}", f"{report.parameters_after:,}"),
        *step0_rows(report.summary.get("fidelity")),
    ]


def _setting(report: ConversionReport) -> str:
    """Where the figures come from, in a sentence or two."""
    sentences = [f"Initialisation {report.init}, weights in {report.dtype}."]
    summary = report.summary
    if "calibration" in summary:
        sentences.append(f"Calibrated on {summary['calibration_tokens']:,} tokens of: {summary['calibration']}.")
    if summary.get("fidelity"):
        sentences.append(
            f"Step-0 quality: before any training, on {summary['fidelity']['num_tokens']:,} other tokens of the same text."
        )
    return "\n".join(html_note(text) for text in (" ".join(sentences), *summary.get("warnings", ())))


def _layer_table(layers: Sequence[LayerReport]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows; a column that no layer has a value for is left out."""
    table: dict[str, list[Any]] = {
        "layer": [layer.layer for layer in layers],
        "kv_lora_rank": [layer.kv_lora_rank or "kept" for layer in layers],
        "qk_rope_head_dim": [layer.qk_rope_head_dim for layer in layers],
        "KV numbers before": [layer.kv_numbers_before for layer in layers],
        "after": [layer.kv_numbers_after for layer in layers],
        "bits": [layer.bits for layer in layers],
        "key error": [layer.key_error for layer in layers],
        "value error": [layer.value_error for layer in layers],
    }
    for key, title in _EXPECTED_AND_MEASURED:
        table[title] = [layer.details.get(key) for layer in layers]
    for stage in _REFINE_STAGES:
        table[f"refine: {stage}"] = [_refine_error(layer, stage) for layer in layers]
    table["refine kept"] = [layer.details.get("refine_kept") for layer in layers]
    table["exactness error"] = [layer.exactness_error for layer in layers]
    table["output error"] = [layer.output_error for layer in layers]
    shown = {title: values for title, values in table.items() if any(value is not None for value in values)}
    return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]


def _legend(layers: Sequence[LayerReport]) -> str:
    """What the error columns mean."""
    sentences = ["Key and value errors are relative."]
    if any("expected_error" in layer.details for layer in layers):
        sentences.append(
            "Measured errors: squared error of the attention's output, relative to what the source puts out. The expected "
            "one is relative to what the heads would put out if they mixed no tokens: it orders layers, not absolute values."
        )
    if any("refine_errors" in layer.details for layer in layers):
        sentences.append(
            "Refine: held-out squared error after the whole layer, relative to what it adds, behind the converted layers below."
        )
    return html_note(" ".join(sentences))


def _refine_error(layer: LayerReport, stage: str) -> float | None:
    value: float | None = layer.details.get("refine_errors", {}).get(stage)
    return value


def _plots(layers: Sequence[LayerReport]) -> list[str]:
    """The plots that these layers have data for, each under its heading."""
    converted = [layer for layer in layers if layer.kv_lora_rank is not None]
    offers: list[tuple[str, str, Draw, bool]] = [
        ("widths", "Cached numbers per token of each layer.", lambda axes: _draw_widths(axes, layers), bool(converted)),
        (
            "spectra",
            "What each row of the latent saves of the expected output error, largest first; rows behind the rank (dot) are lost.",
            lambda axes: _draw_spectra(axes, converted),
            any(layer.details.get("spectrum") for layer in converted),
        ),
        (
            "errors",
            "Expected and measured error of each layer.",
            lambda axes: _draw_errors(axes, converted),
            any("expected_error" in layer.details for layer in converted),
        ),
        (
            "frequencies",
            "Rotary frequencies (0 turns fastest) that the shared rotary keys carry, counted over all layers; "
            "a frequency can be chosen once for each key/value group of a layer.",
            lambda axes: _draw_frequencies(axes, converted),
            any(layer.details.get("rope_index") for layer in converted),
        ),
    ]
    drawn = html_plots([(name, caption, draw) for name, caption, draw, there in offers if there])
    return ["<h2>Plots</h2>", *drawn] if drawn else []


def _draw_widths(axes: Any, layers: Sequence[LayerReport]) -> None:
    numbers = [layer.layer for layer in layers]
    ranks = [layer.kv_lora_rank or 0 for layer in layers]
    ropes = [layer.qk_rope_head_dim or 0 for layer in layers]
    kept = [0 if layer.kv_lora_rank is not None else layer.kv_numbers_after for layer in layers]
    axes.bar(numbers, ranks, label="kv_lora_rank")
    axes.bar(numbers, ropes, bottom=ranks, label="qk_rope_head_dim")
    if any(kept):
        axes.bar(numbers, kept, color="0.75", label="kept attention")
    axes.axhline(max(layer.kv_numbers_before for layer in layers), color="0.4", linestyle="--", label="source")
    axes.set(xlabel="layer", ylabel="numbers per token")
    _finish(axes)


def _draw_spectra(axes: Any, layers: Sequence[LayerReport]) -> None:
    labelled = {layers[place].layer for place in _spread(len(layers), _MOST_LABELS)}
    for place, layer in enumerate(layers):
        spectrum = layer.details.get("spectrum") or []
        top = max(spectrum, default=0.0)
        # rounding of zero eigenvalues would stretch the logarithmic axis by ten decades
        rows = [row for row in _spread(len(spectrum), _MOST_POINTS) if spectrum[row] > 1e-8 * top]
        if not rows:
            continue
        shade = place / max(1, len(layers) - 1) * 0.85
        label = f"layer {layer.layer}" if layer.layer in labelled else None
        (line,) = axes.plot(
            [row + 1 for row in rows], [spectrum[row] for row in rows], color=(shade, 0.3, 1 - shade), label=label
        )
        rank = min(layer.kv_lora_rank or 1, len(spectrum))
        if spectrum[rank - 1] > 1e-8 * top:
            axes.plot([rank], [spectrum[rank - 1]], "o", markersize=4, color=line.get_color())
    axes.set(xlabel="row of the latent", ylabel="expected squared output error", yscale="log")
    _finish(axes)


def _draw_errors(axes: Any, layers: Sequence[LayerReport]) -> None:
    for key, title in _EXPECTED_AND_MEASURED:
        _draw_line(axes, [(layer.layer, layer.details.get(key)) for layer in layers], title, "-")
    for stage in _REFINE_STAGES:
        _draw_line(axes, [(layer.layer, _refine_error(layer, stage)) for layer in layers], f"refine: {stage}", ":")
    axes.set(xlabel="layer", ylabel="relative squared error")
    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        axes.set_yscale("log")
    _finish(axes)


def _draw_line(axes: Any, points: Sequence[tuple[int, float | None]], title: str, style: str) -> None:
    known = [(layer, value) for layer, value in points if value is not None and math.isfinite(value)]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", markersize=4, linestyle=style, label=title)


def _draw_frequencies(axes: Any, layers: Sequence[LayerReport]) -> None:
    times = Counter(int(number) for layer in layers for number in layer.details.get("rope_index") or ())
    numbers = range(max(times) + 1)
    axes.bar(list(numbers), [times[number] for number in numbers])
    axes.set(xlabel="frequency", ylabel="times chosen")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _finish(axes)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` places of `count`, spread evenly, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _finish(axes: Any) -> None:
    """Whole numbers below, a light grid, a legend where there is something to tell apart."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize="small")


def _figure(name: str, caption: str, draw: Draw) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    drawn = io.StringIO()
    with _plain_settings(name):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        FigureCanvasSVG(figure)  # pyplot would look for a display
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing, transparent=True)
    svg = _own_ids(drawn.getvalue(), name)
    label = html.escape(caption, quote=True)
    start = svg.index("<svg") + len("<svg")  # what is before belongs to a file of its own
    return (
        f'<figure>\n<svg role="img" aria-label="{label}"{svg[start:].rstrip()}\n'
        f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
    )


@contextmanager
def _plain_settings(salt: str) -> Iterator[None]:
    """matplotlib as delivered, with ids that depend on the drawing alone and text that stays text."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none", "axes.spines.top": False})
        mpl.rcParams.update({"axes.spines.right": False, "font.size": 9})
        yield


def _own_ids(svg: str, name: str) -> str:
    """The drawing with ids of its own: every figure of matplotlib calls its parts axes_1, patch_1 and so on."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
