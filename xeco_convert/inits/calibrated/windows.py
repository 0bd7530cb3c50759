"""The calibration windows that the options ask for, sampled or read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from xeco_convert.calibration.sampling import sample_windows
from xeco_convert.calibration.text import read_windows
from xeco_convert.calibration.windows import LEAST_TOKENS, CalibrationWindows
from xeco_convert.source import SourceModel

if TYPE_CHECKING:
    from xeco_convert.inits.calibrated import CalibratedInitialisation

_WINDOW_TOKENS = 512
_MEASURED_WINDOWS = 8


def calibration_windows(
    source: SourceModel,
    settings: CalibratedInitialisation,
    seed: int,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> CalibrationWindows:
    """The windows that the options ask for, and some more for measuring."""
    longest = source.values.get("max_position_embeddings")
    length = min(_WINDOW_TOKENS, longest) if isinstance(longest, int) else _WINDOW_TOKENS
    num_tokens = max(settings.calibration_tokens, LEAST_TOKENS) + _MEASURED_WINDOWS * length
    folder = source.index.folder
    if settings.calibration is not None:
        return read_windows(settings.calibration, folder, length=length, num_tokens=num_tokens)
    weights_bytes = sum(header.num_bytes for header in source.index.headers.values())
    sample = partial(sample_windows, folder, weights_bytes=weights_bytes, seed=seed, device=device)
    return sample(length=length, num_tokens=num_tokens, on_progress=on_progress)


def num_calibrated(windows: CalibrationWindows, settings: CalibratedInitialisation) -> int:
    """How many windows to calibrate on: those asked for; the others, or else an eighth of all, are for measuring."""
    total, length = windows.ids.shape
    needed = -(-max(settings.calibration_tokens, LEAST_TOKENS) // length)
    return needed if needed < total else -(-7 * total // 8)


def held_out_from(num_windows: int) -> int:
    """First of the calibration windows that choose between fits: the last eighth."""
    return num_windows - max(1, num_windows // 8)
