"""Calibration: tokens to look at, and the source's hidden states on them, one layer in memory at a time."""

from xeco_convert.calibration.windows import CalibrationWindows

__all__ = ["CalibrationWindows"]
