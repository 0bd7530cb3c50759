"""The source written as MLA without approximation gives the source's logits: layout, sign, scale, biases and rotary
frequencies are understood, for every family and rotary scaling."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import (
    ORIGINAL_LENGTH,
    ROPES,
    VARIANTS,
    build_checkpoint,
    exact_model,
    random_ids,
    save_exact_checkpoint,
    source_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

# In float32, relative to the logits' standard deviation: 3e-6 was observed over all cases.
TOLERANCE = 2e-5
LENGTH = 40  # beyond the sliding windows (7) and the original length (16) of the scaled rotary types
CASES = [(variant, "default") for variant in VARIANTS]
CASES += [
    (variant, rope) for variant in ("llama", "mistral_window", "qwen2_window") for rope in ROPES if rope != "default"
]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def step_by_step(model: PreTrainedModel, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Logits of a cached run: `first` tokens at once, then one at a time."""
    output = model(ids[:, :first], use_cache=True)
    logits, cache = [output.logits], output.past_key_values
    for position in range(first, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("variant", "rope"), CASES)
def test_exact_form_gives_the_logits_of_the_source(variant: str, rope: str) -> None:
    source = source_model(variant, rope)
    ids = random_ids(2, LENGTH)
    assert difference(exact_model(source)(ids).logits, source(ids).logits) < TOLERANCE


@pytest.mark.parametrize(("variant", "rope"), CASES)
def test_exact_form_gives_the_logits_of_the_source_with_a_cache(variant: str, rope: str) -> None:
    source = source_model(variant, rope)
    ids = random_ids(1, ORIGINAL_LENGTH + 6)
    expected = step_by_step(source, ids, ORIGINAL_LENGTH - 3)
    assert difference(step_by_step(exact_model(source), ids, ORIGINAL_LENGTH - 3), expected) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama_bias", "mistral", "qwen2"])
def test_exact_form_gives_the_logits_of_the_source_in_bfloat16(variant: str) -> None:
    """Two orders of rounding: the error against float32 is at most twice the source's own in the same dtype."""
    source = source_model(variant)
    exact, ids = exact_model(source), random_ids(2, LENGTH)
    expected = source(ids).logits
    plain = (source.to(torch.bfloat16)(ids).logits.float() - expected).square().mean()
    found = (exact.to(torch.bfloat16)(ids).logits.float() - expected).square().mean()
    assert found.sqrt() <= 2 * plain.sqrt()


@pytest.mark.parametrize("layers", [[0], [1, 2], [2]])
def test_kept_layers_are_the_layers_of_the_source(layers: list[int]) -> None:
    source = source_model("qwen2_window")
    ids = random_ids(2, LENGTH)
    assert difference(exact_model(source, layers)(ids).logits, source(ids).logits) < TOLERANCE


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_settings_in_the_old_style_are_kept(rope: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "old", "llama", rope, old_style=True)
    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(1, LENGTH)
    assert difference(source(ids).logits, source_model("llama", rope)(ids).logits) < TOLERANCE
    assert difference(exact_model(source)(ids).logits, source(ids).logits) < TOLERANCE


@pytest.mark.parametrize("rope", ROPES)
def test_exact_form_survives_its_files(rope: str, tmp_path: Path) -> None:
    source = source_model("qwen2_window", rope)
    folder = save_exact_checkpoint(tmp_path / "exact", exact_model(source))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(1, LENGTH)
    assert difference(loaded(ids).logits, source(ids).logits) < TOLERANCE


def change_scale(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling *= 1.05


def change_frequency_order(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.rope_index = tuple(reversed(attention.rope_index))


def swap_rotary_rows(model: PreTrainedModel) -> None:
    weight = model.model.layers[2].self_attn.kv_a_proj_with_mqa.weight
    weight.data[-2:] = weight.data[-2:].flip(0)


def drop_key_bias(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.kv_a_proj_with_mqa.bias.data.zero_()


def drop_value_bias(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.kv_b_proj.bias.data.zero_()


@pytest.mark.parametrize(
    "damage", [change_scale, change_frequency_order, swap_rotary_rows, drop_key_bias, drop_value_bias]
)
def test_small_faults_are_far_outside_the_tolerance(damage: Callable[[PreTrainedModel], None]) -> None:
    """What makes the tests above worth something: the models' attention depends on every part."""
    source = source_model("qwen2")
    damaged, ids = copy.deepcopy(exact_model(source)), random_ids(2, LENGTH)
    damage(damaged)
    assert difference(damaged(ids).logits, source(ids).logits) > 1000 * TOLERANCE
