"""What only a GPU can show: the registered ops, graphs, compilation, and results that are the same in every run."""

from typing import Any

import pytest
import torch
from operands import COMMON, RULES, Sizes, assert_as_good_as_plain, finite, inputs, plain_torch
from real import on_gpu
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_decode
from xeco_convert.ops.extension import kernel_obstacle

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
RANKS, ROPES = (16, 48, 64, 80, 128, 160, 256, 320, 512), (16, 32, 64, 128)


def on_device(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    return [x.cuda() for x in inputs(sizes, dtype)]


def test_compiled_kernels_serve_this_gpu() -> None:
    """A GPU is present: then a build without its kernels is a failure, not a reason to skip."""
    for dtype in DTYPES:
        assert kernel_obstacle("cuda", dtype) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_the_public_function_and_its_gradients_are_right_in_every_dtype(dtype: torch.dtype, rule: str) -> None:
    rules = {name: on_gpu(value) if isinstance(value, Tensor) else value for name, value in RULES[rule].items()}
    tensors = [x.requires_grad_() for x in on_device(COMMON, dtype)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for leaves in (tensors, exact):
        out, lse = latent_attention(*leaves, softmax_scale=COMMON.softmax_scale, **rules)
        (out.square().sum() + finite(lse).sum()).backward()
        results.append([out.detach(), finite(lse.detach()), *(x.grad for x in leaves)])
    tolerance = 8 * torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-30)
        assert error <= tolerance, float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rope", ROPES)
def test_every_width_decodes_and_attends(dtype: torch.dtype, rank: int, rope: int) -> None:
    for sizes in (Sizes(1, 3000, 32, rank, rope), Sizes(200, 300, 4, rank, rope)):
        tensors = on_device(sizes, dtype)
        exact = latent_attention(*(x.double() for x in tensors), softmax_scale=sizes.softmax_scale)
        plain = plain_torch(tensors, sizes, {})
        found = (latent_attention_decode if sizes.Q == 1 else latent_attention)(
            *tensors, softmax_scale=sizes.softmax_scale
        )
        assert_as_good_as_plain([found[0]], [plain[0]], [exact[0]], dtype, sizes.num_terms)


@pytest.mark.parametrize(
    "sizes", [Sizes(1, 5000, 32, 128, 32, 4), Sizes(257, 513, 8, 160, 64), Sizes(65, 129, 16, 512, 64)]
)
def test_twenty_runs_give_the_same_bits(sizes: Sizes) -> None:
    tensors = [x.requires_grad_() for x in on_device(sizes, torch.bfloat16)]
    first: list[Tensor] | None = None
    for _ in range(20):
        out, lse = latent_attention(*tensors, softmax_scale=sizes.softmax_scale)
        gradients = torch.autograd.grad(out.sum() + lse.sum(), tensors)
        with torch.no_grad():
            decoded = latent_attention_decode(*tensors, softmax_scale=sizes.softmax_scale)
        results = [out.detach(), lse.detach(), *gradients, *decoded]
        first = first or results
        for one, other in zip(results, first, strict=True):
            assert torch.equal(one, other)


def test_decode_is_captured_in_a_graph_and_follows_lengths_that_change() -> None:
    sizes = Sizes(1, 2048, 32, 128, 32, 4)
    tensors, lengths = on_device(sizes, torch.bfloat16), torch.full((4,), 2048, device="cuda")
    options: dict[str, Any] = {"softmax_scale": sizes.softmax_scale, "lengths": lengths}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        latent_attention_decode(*tensors, **options)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out, lse = latent_attention_decode(*tensors, **options)
    for new in ([2048, 1, 100, 777], [0, 2047, 64, 65]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        expected = latent_attention_decode(*tensors, **options)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_the_ops_pass_opcheck_and_compile_whole() -> None:
    tensors = [x.requires_grad_() for x in on_device(COMMON, torch.bfloat16)]
    rule = (None, None, None, COMMON.softmax_scale, True, 0, 0.0)
    torch.library.opcheck(torch.ops.xeco.latent_attention, (*tensors, *rule), rtol=0.05, atol=0.05)

    def attend(*given: Tensor) -> Tensor:
        return latent_attention(*given, softmax_scale=COMMON.softmax_scale)[0]

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*tensors), attend(*tensors))


def test_a_stream_that_is_not_the_default_is_used() -> None:
    tensors = on_device(COMMON, torch.bfloat16)
    expected = latent_attention(*tensors, softmax_scale=COMMON.softmax_scale)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = latent_attention(*tensors, softmax_scale=COMMON.softmax_scale)[0]
    side.synchronize()
    assert torch.equal(found, expected)
