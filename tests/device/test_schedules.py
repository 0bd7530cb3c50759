"""The order in which warps run: results do not depend on it, and would if a barrier of the kernels were missing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import Emulated
from operands import Sizes, inputs
from torch import Tensor

from xeco_convert.ops.packed_rows import pack_rows

SEEDS = range(5)
# Several tiles for every stage, and every way to share rows: warps by rows, by columns, by both, some without tokens.
FORWARD = [
    Sizes(1, 150, 10, 32, 16, 1),
    Sizes(1, 130, 30, 128, 16, 1),
    Sizes(5, 130, 13, 64, 16, 1),
    Sizes(3, 70, 24, 256, 16, 1),
    Sizes(2, 70, 16, 512, 16, 1),
]
BACKWARD = [Sizes(9, 130, 15, 64, 16, 1), Sizes(5, 70, 13, 128, 16, 1), Sizes(2, 40, 33, 256, 16, 1)]


def forward(gpu: Emulated, sizes: Sizes, stages: int) -> list[Tensor]:
    machine = replace(gpu, max_stages=stages)
    return list(machine.latent_attention(*inputs(sizes, torch.bfloat16), softmax_scale=sizes.softmax_scale))


def packed(gpu: Emulated, sizes: Sizes, stages: int) -> list[Tensor]:
    """Over rows of codes."""
    machine, (q_latent, q_rope, c_kv, k_rope) = replace(gpu, max_stages=stages), inputs(sizes, torch.bfloat16)
    rule: dict[str, Any] = {"latent_bits": 4, "rope_bits": 8, "softmax_scale": sizes.softmax_scale}
    return list(machine.latent_attention_packed(q_latent, q_rope, pack_rows(c_kv, 4), pack_rows(k_rope, 8), **rule))


def backward(gpu: Emulated, sizes: Sizes, stages: int, saved: list[Tensor], **fields: Any) -> list[Tensor]:
    """d_q_latent, d_q_rope, d_c_kv, d_k_rope."""
    machine, tensors = replace(gpu, max_stages=stages, **fields), inputs(sizes, torch.bfloat16)
    d_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    return machine.latent_attention_backward(d_out, None, tensors, *saved, softmax_scale=sizes.softmax_scale)


def same(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("kind", [forward, packed])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("sizes", FORWARD)
def test_the_forward_pass_is_the_same_in_every_order(emulated: Emulated, sizes: Sizes, stages: int, kind: Any) -> None:
    expected = kind(emulated, sizes, stages)
    assert all(same(kind(replace(emulated, seed=seed), sizes, stages), expected) for seed in SEEDS)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("sizes", BACKWARD)
def test_the_backward_pass_is_the_same_in_every_order(emulated: Emulated, sizes: Sizes, stages: int) -> None:
    saved = forward(emulated, sizes, stages)
    expected = backward(emulated, sizes, stages, saved)
    assert all(same(backward(emulated, sizes, stages, saved, seed=seed), expected) for seed in SEEDS)


@pytest.mark.parametrize("kind", [forward, packed])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("sizes", FORWARD)
def test_no_barrier_of_the_forward_pass_could_be_left_out(
    emulated: Emulated, sizes: Sizes, stages: int, kind: Any
) -> None:
    expected = kind(emulated, sizes, stages)
    count = emulated.num_barriers(0)
    assert count >= 3
    for barrier in range(count):
        orders = (replace(emulated, seed=seed, without_barrier=barrier) for seed in SEEDS)
        assert not all(same(kind(order, sizes, stages), expected) for order in orders), f"{barrier} of {count}"


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("sizes", BACKWARD)
def test_no_barrier_of_the_backward_pass_could_be_left_out(emulated: Emulated, sizes: Sizes, stages: int) -> None:
    saved = forward(emulated, sizes, stages)
    expected = backward(emulated, sizes, stages, saved)
    of_queries, of_tokens = emulated.num_barriers(1), emulated.num_barriers(2)  # 0 is delta's kernel, which has none
    assert min(of_queries, of_tokens) >= 3
    for barrier in range(max(of_queries, of_tokens)):
        unnoticed = {"d_q": barrier < of_queries, "d_rows": barrier < of_tokens}
        for seed in SEEDS:
            if not any(unnoticed.values()):
                break
            result = backward(emulated, sizes, stages, saved, seed=seed, without_barrier=barrier)
            unnoticed["d_q"] &= same(result[:2], expected[:2])
            unnoticed["d_rows"] &= same(result[2:], expected[2:])
        assert not any(unnoticed.values()), f"{barrier} of {of_queries}, {of_tokens}: {unnoticed}"
