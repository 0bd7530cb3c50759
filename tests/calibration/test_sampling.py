"""Calibration text from the source itself: seeded, of the model's own distribution, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xeco_convert.calibration import CalibrationWindows, sampling
from xeco_convert.calibration.sampling import sample_windows
from xeco_convert.errors import CheckpointError


def sampled(folder: Path, *, seed: int = 0, num_tokens: int = 1200, weights_bytes: int = 1000) -> CalibrationWindows:
    return sample_windows(
        folder,
        weights_bytes=weights_bytes,
        length=32,
        num_tokens=num_tokens,
        seed=seed,
        device=torch.device("cpu"),
    )


def test_samples_are_seeded_and_leave_the_global_generator_alone(llama: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = sampled(llama)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(sampled(llama).ids, first.ids)
    assert not torch.equal(sampled(llama, seed=1).ids, first.ids)
    assert first.ids.shape == (38, 32)  # 1200 tokens, rounded up to windows; two batches
    assert bool((first.ids[:, 0] == 1).all()) and not bool(first.counts[:, 0].any())
    assert torch.equal(first.counts, (first.ids != 1) & (first.ids != 0))
    assert first.description == "38 samples of the source model"
    assert first.ids[:6].unique().numel() > 40  # a random model writes any word


def test_too_few_tokens_are_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="expected at least 1024"):
        sampled(llama, num_tokens=500)


def test_a_source_that_does_not_fit_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "available_memory_bytes", lambda: 100 * 10**9)
    with pytest.raises(CheckpointError, match=r"\(140 GB, 100 GB are free\); give text instead: --calibration FILE"):
        sampled(llama, weights_bytes=140 * 10**9)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert sampling.available_memory_bytes() > 10**8
