"""The choice of the implementation: pure, by counted work, and with its reason in words."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from xeco_convert.ops import choice
from xeco_convert.ops.choice import AttentionCall, AttentionChoiceError, choose, counted_operations, explain

# DeepSeek-V2's widths: expanding pays early
WIDE: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SLIM: dict[str, Any] = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
SIZES = [(1, 1), (1, 1000), (7, 129), (129, 129), (4096, 4096), (64, 8192)]
OBSTACLES = {
    "weights": ({"needs_weights": True}, "attention weights are asked for, and the kernels never hold them"),
    "dropout": ({"dropout": 0.1}, "the kernels have no dropout on attention weights"),
    "rank": ({"kv_lora_rank": 520}, "the kernels take kv_lora_rank up to 512 and qk_rope_head_dim up to 128"),
    "rope": ({"qk_rope_head_dim": 130}, "the kernels take kv_lora_rank up to 512 and qk_rope_head_dim up to 128"),
    "kernel": ({"kernel_obstacle": "there are no compiled kernels for cuda tensors"}, "no compiled kernels for cuda"),
    "mask": ({"has_mask": True, "mask_obstacle": "the mask has holes"}, "the mask has holes"),
    "weight": ({"weight_obstacle": "kv_b_proj is wrapped"}, "kv_b_proj is wrapped"),
}


def call(queries: int, tokens: int, **settings: Any) -> AttentionCall:
    return AttentionCall(num_queries=queries, num_tokens=tokens, **{**WIDE, **settings})


@pytest.mark.parametrize(("queries", "tokens"), SIZES)
@pytest.mark.parametrize("has_mask", [True, False])
def test_operations_are_counted_matrix_by_matrix(queries: int, tokens: int, has_mask: bool) -> None:
    rank, nope, rope, value = WIDE.values()
    seen = sum(tokens - queries + i + 1 for i in range(queries))
    pairs = queries * tokens if has_mask else seen
    carried = queries * nope * rank + queries * rank * value
    found = counted_operations(call(queries, tokens, has_mask=has_mask))
    assert found == {
        "fused": 2 * (carried + seen * (rank + rope) + seen * rank),
        "absorbed": 2 * (carried + pairs * (rank + rope) + pairs * rank),
        "expanded": 2 * (tokens * rank * (nope + value) + pairs * (nope + rope) + pairs * value),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", [WIDE, SLIM])
@pytest.mark.parametrize("can_fuse", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("queries", "tokens"), SIZES)
def test_the_fewest_operations_are_chosen(
    queries: int, tokens: int, device: str, can_fuse: bool, widths: dict[str, Any], training: bool
) -> None:
    obstacle = None if can_fuse else "no kernel"
    given = call(queries, tokens, **widths, kernel_obstacle=obstacle, needs_gradients=training, device_type=device)
    counts = counted_operations(given)
    speed = (choice.FUSED_TRAINING_SPEED if training else choice.FUSED_SPEED)[device]
    latents = counts["fused"] / speed if can_fuse else counts["absorbed"]
    name = "fused" if can_fuse else "absorbed"
    expected = name if queries == 1 or latents <= counts["expanded"] else "expanded"
    assert choose(given).implementation == expected


def test_all_three_are_chosen_somewhere() -> None:
    found = {choose(call(q, t, **w)).implementation for q, t in SIZES for w in (WIDE, SLIM)}
    found |= {choose(call(q, t, kernel_obstacle="none", **w)).implementation for q, t in SIZES for w in (WIDE, SLIM)}
    assert found == {"fused", "absorbed", "expanded"}


@pytest.mark.parametrize("tokens", [1, 2, 100_000])
def test_decode_never_expands(tokens: int) -> None:
    assert choose(call(1, tokens)).implementation == "fused"
    assert choose(call(1, tokens, kernel_obstacle="no kernel")).implementation == "absorbed"


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_the_kernels_cannot_do_goes_elsewhere_unless_asked_for(case: str) -> None:
    change, sentence = OBSTACLES[case]
    for queries, tokens in SIZES:
        given = call(queries, tokens, **{**SLIM, **change})
        assert choose(given).implementation != "fused"
        assert sentence in explain(given)
        with pytest.raises(AttentionChoiceError, match="XECO_ATTENTION=fused cannot serve this call: ") as error:
            choose(given, "fused")
        assert sentence in str(error.value) and str(error.value) == explain(given, "fused")


@pytest.mark.parametrize(("queries", "tokens"), SIZES)
def test_what_is_asked_for_by_name_is_taken(queries: int, tokens: int) -> None:
    given = call(queries, tokens)
    assert choose(given, "fused") == ("fused", "XECO_ATTENTION=fused")
    assert choose(given, "reference") == ("reference", "XECO_ATTENTION=reference")
    without = call(queries, tokens, kernel_obstacle="no kernel")
    assert choose(given, "sdpa") == choose(without)


def test_weights_come_from_the_reference() -> None:
    given = call(7, 129, needs_weights=True)
    assert choose(given).implementation == choose(given, "reference").implementation == "reference"
    with pytest.raises(AttentionChoiceError, match="XECO_ATTENTION=sdpa cannot serve this call: attention weights"):
        choose(given, "sdpa")


@pytest.mark.parametrize(("queries", "tokens"), SIZES)
@pytest.mark.parametrize("obstacle", [None, "no kernel"])
def test_soft_capped_layers_choose_as_others_but_never_sdpa(queries: int, tokens: int, obstacle: str | None) -> None:
    plain = call(queries, tokens, kernel_obstacle=obstacle)
    capped = call(queries, tokens, kernel_obstacle=obstacle, soft_capped=True)
    assert choose(capped) == choose(plain) and choose(capped, "reference") == choose(plain, "reference")
    with pytest.raises(
        AttentionChoiceError, match="XECO_ATTENTION=sdpa cannot serve this call: it does not bound scores"
    ):
        choose(capped, "sdpa")


def test_a_weight_that_cannot_be_absorbed_is_expanded_through() -> None:
    given = call(1, 1000, weight_obstacle="kv_b_proj is wrapped")
    assert choose(given) == choose(given, "sdpa") == ("expanded", "kv_b_proj is wrapped")
    assert choose(given, "reference").implementation == "reference"


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(AttentionChoiceError, match="expected one of reference, fused, sdpa, found 'flash'"):
        choose(call(1, 1), "flash")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
@pytest.mark.parametrize(("queries", "tokens"), SIZES)
def test_a_device_without_kernels_has_a_choice_and_an_explanation(queries: int, tokens: int, device: str) -> None:
    given = call(
        queries, tokens, device_type=device, kernel_obstacle=f"there are no compiled kernels for {device} tensors"
    )
    assert choose(given).implementation == choose(replace(given, device_type="cpu")).implementation != "fused"
    assert "no compiled kernels" in explain(given)


def test_the_explanation_names_choice_reason_and_counts() -> None:
    assert explain(call(2, 4, **SLIM)) == (
        "fused: fewest operations: attending to the latents (operations per head and sequence: "
        "fused 2.68e+04, absorbed 2.68e+04, expanded 5.09e+04; fused counts as 1/2)"
    )


def test_the_file_needs_the_standard_library_alone() -> None:
    """It is shipped beside the weights."""
    code = f"import runpy, sys; runpy.run_path({choice.__file__!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
