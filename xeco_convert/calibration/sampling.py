"""Calibration text sampled from the source model itself: what it writes is what it was trained on, and no data is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xeco_convert.calibration.windows import CalibrationWindows
from xeco_convert.errors import CheckpointError
from xeco_convert.pretrained import load_causal_lm

_BATCH_ROWS = 32
Share = Callable[[float], None]


@torch.no_grad()
def sample_windows(
    folder: Path,
    *,
    weights_bytes: int,
    length: int,
    num_tokens: int,
    seed: int,
    device: torch.device,
    on_progress: Share | None = None,
) -> CalibrationWindows:
    """About `num_tokens` tokens sampled at temperature 1 from the model in `folder`, in windows of `length`.

    Loads the whole model, so it is refused (`CheckpointError`) where the machine's free memory does not hold it.
    """
    _check_memory(folder, weights_bytes, device)
    model = load_causal_lm(folder, "auto").to(device).eval()
    rows = max(1, -(-num_tokens // length))
    ids, counts = sample_rows(model, rows, length, seed, on_progress=on_progress)
    return CalibrationWindows(ids=ids, counts=counts, description=f"{rows} samples of the source model").checked(None)


@torch.no_grad()
def sample_rows(
    model: Any,
    rows: int,
    length: int,
    seed: int,
    rows_per_batch: int = _BATCH_ROWS,
    on_progress: Share | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] sampled at temperature 1 from a causal language model, and which of them count (bool).

    The same seed gives the same tokens; torch's own random state is left as it was. `on_progress` is told the share done.
    """
    config = model.config.get_text_config()
    start = _start_token(config)
    count = None if on_progress is None else _TokenCount(rows * length, on_progress)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        parts = [
            _sample(model, min(rows_per_batch, rows - done), length, start, count).cpu()
            for done in range(0, rows, rows_per_batch)
        ]
    ids = torch.cat(parts)
    special = [token for token in (config.bos_token_id, config.pad_token_id) if isinstance(token, int)]
    return ids, ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))


class _TokenCount:
    """What transformers hands new tokens to: only counts them."""

    def __init__(self, wanted: int, on_progress: Share) -> None:
        self._wanted, self._on_progress, self._count = wanted, on_progress, 0

    def put(self, tokens: torch.Tensor) -> None:
        self._count += tokens.numel()
        self._on_progress(min(1.0, self._count / self._wanted))

    def end(self) -> None:
        """The end of a batch."""


def _sample(model: Any, rows: int, length: int, start: int, count: _TokenCount | None) -> torch.Tensor:
    """Token ids [rows, length]. A sequence that ends goes on with the next one, as packed training text does."""
    from transformers import GenerationConfig

    prompt = torch.full((rows, 1), start, device=model.device)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    kept, model.generation_config = model.generation_config, settings
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=count
    )
    model.generation_config = kept
    return tokens


def _start_token(config: Any) -> int:
    """The token that texts begin with: bos, else eos (which separates them), else 0. Ids that a trimmed vocabulary does not
    have any more count as none."""
    for given in (config.bos_token_id, config.eos_token_id):
        token = given[0] if isinstance(given, list) and given else given
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    return 0


def _check_memory(folder: Path, weights_bytes: int, device: torch.device) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory_bytes()
    if weights_bytes * 1.2 > free:
        raise CheckpointError(
            f"{folder}: sampling calibration text needs the whole source in memory ({weights_bytes / 1e9:.0f} GB, "
            f"{free / 1e9:.0f} GB are free); give text instead: --calibration FILE."
        )


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping; a large number where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 2**62
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
