"""Stock formats: converted checkpoints as engines load them without this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xeco_convert.export.options import ExportOptions

if TYPE_CHECKING:
    from xeco_convert.export.pipeline import ExportReport as ExportReport
    from xeco_convert.export.pipeline import export_checkpoint as export_checkpoint

__all__ = ["ExportOptions", "ExportReport", "export_checkpoint"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch takes seconds to import, and --help must not.
    if name in ("ExportReport", "export_checkpoint"):
        from xeco_convert.export import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
