"""Tensors that lie further apart than an int32 counts: what is read and written is what a copy without gaps gives."""

import mmap

import pytest
import torch
from emulated import Emulated
from operands import Sizes, inputs
from torch import Tensor

from xeco_convert.ops import latent_attention

SIZES = Sizes(3, 70, 3, 24, 8)
_WITHOUT_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; Python has the name since 3.13
FAR = 2**31 + 8  # elements; rows stay on 16 bytes


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides, in memory that is there where it is touched alone. What lies between is zero."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _WITHOUT_RESERVE
    pages = mmap.mmap(-1, 2 * (last + 1), flags=flags)
    flat = torch.frombuffer(pages, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, strides).copy_(tensor)


QUERIES = {
    "sequences": (FAR, 3 * 24, 24, 1),
    "queries": (24, FAR, 2 * 24, 1),
    "heads": (3 * 24, 24, FAR, 1),
    "heads, in odd places": (3 * 25, 25, FAR + 1, 1),
}
ROWS = {"sequences": (FAR, 24, 1), "tokens": (24, 2**25 + 8, 1), "tokens, in odd places": (25, 2**25 + 1, 1)}


def assert_same(emulated: Emulated, near: list[Tensor], far: list[Tensor]) -> None:
    scale, d_out = SIZES.softmax_scale, near[0] * 0.5
    expected = emulated.latent_attention(*near, softmax_scale=scale)
    result = emulated.latent_attention(*far, softmax_scale=scale)
    gradients = [
        emulated.latent_attention_backward(
            d_out.clone() if place is near else spread(d_out, far[0].stride()),
            None,
            place,
            *expected,
            softmax_scale=scale,
        )
        for place in (near, far)
    ]
    for one, other in zip([*result, *gradients[1]], [*expected, *gradients[0]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("which", QUERIES)
def test_queries_may_lie_far_apart(emulated: Emulated, which: str) -> None:
    near = inputs(SIZES, torch.bfloat16)
    assert_same(emulated, near, [*(spread(x, QUERIES[which]) for x in near[:2]), *near[2:]])


@pytest.mark.parametrize("which", ROWS)
def test_cached_rows_may_lie_far_apart(emulated: Emulated, which: str) -> None:
    near = inputs(SIZES, torch.bfloat16)
    assert_same(emulated, near, [*near[:2], *(spread(x, ROWS[which]) for x in near[2:])])


def test_pages_may_lie_far_apart(emulated: Emulated) -> None:
    q_latent, q_rope, *rows = inputs(SIZES, torch.bfloat16)
    pages = [x.reshape(14, 10, -1) for x in rows]
    far = [spread(x, (2**28 + 8, x.shape[-1], 1)) for x in pages]
    table = torch.arange(14, dtype=torch.int32).flip(0).view(2, 7)
    options = {"softmax_scale": 0.2, "lengths": torch.tensor([70, 61]), "block_table": table, "num_splits": 2}
    expected = emulated.latent_attention_decode(q_latent, q_rope, *pages, **options)
    result = emulated.latent_attention_decode(q_latent, q_rope, *far, **options)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("strides", [(FAR, 24, 1), (24, 2**29 + 8, 1)])
def test_new_rows_go_into_caches_that_lie_far_apart(emulated: Emulated, strides: tuple[int, ...]) -> None:
    c_kv, k_rope = torch.randn(2, 3, 24).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    angles = [torch.rand(2, 3, 8) for _ in range(2)]
    near = [torch.zeros(2, 9, width, dtype=torch.bfloat16) for width in (24, 8)]
    far = [spread(x, strides) for x in near]
    for caches in (near, far):
        emulated.rope_and_append(c_kv, k_rope, *angles, *caches, positions=torch.tensor([6, 2]))
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


@pytest.mark.gpu
def test_sequences_may_lie_far_apart_on_the_gpu() -> None:
    near = [x.cuda() for x in inputs(SIZES, torch.bfloat16)]
    far = near[:2]
    for x in near[2:]:
        flat = torch.empty(FAR + x[0].numel(), dtype=x.dtype, device="cuda")
        far.append(flat.as_strided(x.shape, (FAR, x.shape[-1], 1)).copy_(x))
    results = []
    for tensors in (near, far):
        leaves = [x.requires_grad_() for x in tensors]
        out, lse = latent_attention(*leaves, softmax_scale=SIZES.softmax_scale)
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
