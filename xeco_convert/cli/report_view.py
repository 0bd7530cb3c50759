"""The report of a conversion as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from xeco_convert.commandline.output import print_table
from xeco_convert.report import format_cell

if TYPE_CHECKING:
    from xeco_convert.report import ConversionReport


def show_report(report: ConversionReport) -> None:
    columns = ["layer", "kv_lora_rank", "rope dim", "key error", "value error", "KV bytes before", "KV bytes after"]
    verified = any(layer.exactness_error is not None for layer in report.layers)
    rows = []
    for layer in report.layers:
        row = [
            layer.layer,
            layer.kv_lora_rank or "kept",
            layer.qk_rope_head_dim or "",
            layer.key_error,
            layer.value_error,
        ]
        row += [layer.kv_numbers_before * report.kv_bytes_per_number, layer.kv_bytes_after]
        rows.append(row + ([layer.exactness_error, layer.output_error] if verified else []))
    print_table(columns + (["exactness error", "output error"] if verified else []), rows)
    click.echo(f"KV cache: {report.kv_bytes_before} -> {report.kv_bytes_after} bytes per token ({report.kv_share:.1%})")
    if report.path_error is not None:
        click.echo(
            f"path to the logits, attention set aside: differs by {format_cell(report.path_error)} of their deviation"
        )
    change = report.parameters_after / report.parameters_before - 1
    click.echo(f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} ({change:+.1%})")
    if report.timings:
        parts = (f"{name} {times['seconds']:.0f}" for name, times in report.timings.items())
        click.echo(f"seconds: {', '.join(parts)}")
    click.echo(
        f"{report.output}: written in {report.seconds:.1f} s, peak memory {report.peak_memory_bytes / 2**20:.0f} MiB"
    )
