"""Stock formats: converted checkpoints as engines load them without this package."""

from xeco_convert.export.pipeline import FORMATS, ExportOptions, ExportReport, export_checkpoint
from xeco_convert.export.targets import TARGETS

__all__ = ["FORMATS", "TARGETS", "ExportOptions", "ExportReport", "export_checkpoint"]
