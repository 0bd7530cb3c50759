"""Text that the exported model writes itself, for what has to be measured: no data is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xeco_convert.calibration.sampling import sample_windows
from xeco_convert.calibration.windows import CalibrationWindows

_WINDOW_TOKENS = 256
_NUM_WINDOWS = 16


class OwnText:
    """Windows of the model in `folder`, sampled on first use; `on_progress` is told the share done."""

    def __init__(
        self, folder: Path, config: Any, *, weights_bytes: int, seed: int, on_progress: Callable[[float], None]
    ) -> None:
        self._folder, self._weights_bytes, self._on_progress = folder, weights_bytes, on_progress
        self._length = min(_WINDOW_TOKENS, getattr(config, "max_position_embeddings", _WINDOW_TOKENS))
        self.seed = seed

    @cached_property
    def windows(self) -> CalibrationWindows:
        """About 4096 tokens. Raises `CheckpointError` where the model does not fit into memory."""
        return sample_windows(
            self._folder,
            weights_bytes=self._weights_bytes,
            length=self._length,
            num_tokens=_NUM_WINDOWS * _WINDOW_TOKENS,
            seed=self.seed,
            device=torch.device("cpu"),
            on_progress=self._on_progress,
        )
