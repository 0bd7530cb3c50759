"""The baselines are what their descriptions say: exact where nothing is dropped, and on the model they are measured as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from baselines import baseline_model, factors, plain_moments, rotary_slots
from builders import build_checkpoint, random_attention, random_ids
from calibrated_layers import context_of, gaussian_inputs, output_error
from transformers import AutoModelForCausalLM

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.errors import OptionError


def moments_of(groups: int, half: int) -> torch.Tensor:
    noise = torch.randn(300, 2 * groups * half, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.T @ noise / 300


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_all_rotary_rows_and_full_rank_are_the_source(folded: bool, bias: str) -> None:
    source, x = random_attention(4, 2, hidden=80, bias=bias), gaussian_inputs(80, windows=16)
    moments = plain_moments(source, x, torch.ones(x.shape[:2], dtype=torch.bool))
    mla = factors(source, moments, 32, 8, folded=folded).to(torch.float64)
    assert mla.rope_index == (0, 0, 1, 1, 2, 2, 3, 3)
    assert output_error(source, mla, x, context_of(source)) < 1e-9  # float32 weights


@pytest.mark.parametrize("folded", [False, True])
def test_slots_read_principal_directions_across_groups(folded: bool) -> None:
    """Rows are orthonormal, both parts of a pair alike, and turn evenly spaced frequencies."""
    rows, frequencies = rotary_slots(moments_of(3, 8), 3, 4, folded=folded)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8, dtype=torch.float64))
    assert frequencies == (0, 2, 4, 6)
    real, imaginary = rows.view(2, 4, 3, 2, 8)
    torch.testing.assert_close(real[:, :, 0], imaginary[:, :, 1])
    assert not real[:, :, 1].any() and not imaginary[:, :, 0].any()
    used = real[:, :, 0].abs().sum(dim=1) > 0  # [slot, frequency]
    assert used.sum(dim=1).tolist() == ([2] * 4 if folded else [1] * 4)


def test_a_fold_holds_more_of_its_keys_than_one_frequency_does() -> None:
    moments = moments_of(2, 8)

    def kept(folded: bool) -> float:
        rows, _ = rotary_slots(moments, 2, 4, folded=folded)
        return float((rows @ moments @ rows.T).trace())

    assert kept(True) > kept(False)


@pytest.mark.parametrize("kind", ["weights", "transmla"])
def test_the_model_is_the_source_at_full_width(kind: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "in", "llama")
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_ids(20, 64, seed=1)
    windows = CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="random")
    model = baseline_model(kind, source, folder, (32, 16), windows, attended=kind == "weights")
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:2, :20]).logits, source(ids[:2, :20]).logits, rtol=1e-3, atol=1e-3)
        small = baseline_model(kind, source, folder, (4, 4), windows)(ids[:2, :20]).logits
    assert float((small - source(ids[:2, :20]).logits).detach().norm()) > 0.01


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "in", "llama")
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(OptionError, match="transmla: expected calibration text, found none"):
        baseline_model("transmla", source, folder, (8, 4), None)
    with pytest.raises(OptionError, match="expected a rotary width that divides head_dim"):
        baseline_model("weights", source, folder, (8, 6), None)
