"""Stock formats, one package each: model classes that engines have, with latent attention."""

from xeco_convert.export.formats.format import FORMATS, ExportFormat, Read, StockLayout

__all__ = ["FORMATS", "ExportFormat", "Read", "StockLayout"]
