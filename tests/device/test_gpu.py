"""What only a GPU can show: the registered ops, graphs, compilation, and results that are the same in every run."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from operands import COMMON, RULES, Sizes, finite, inputs
from real import on_gpu
from rounding import assert_rounded_as_predicted, predicted
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_decode, rope_and_append
from xeco_convert.ops.extension import kernel_obstacle

if not torch.cuda.is_available():
    pytest.skip("no GPU is present", allow_module_level=True)
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
        result = (latent_attention_decode if sizes.Q == 1 else latent_attention)(
            *tensors, softmax_scale=sizes.softmax_scale
        )
        assert_rounded_as_predicted(result, predicted(tensors, sizes, {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rope", ROPES)
def test_every_width_has_its_gradients(dtype: torch.dtype, rank: int, rope: int) -> None:
    sizes = Sizes(130, 200, 4, rank, rope)
    tensors = on_device(sizes, dtype)
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = latent_attention(*leaves, softmax_scale=sizes.softmax_scale)
    generator = torch.Generator("cuda").manual_seed(1)
    factors = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in results]
    result = torch.autograd.grad(results, leaves, factors)
    assert_rounded_as_predicted(result, predicted(tensors, sizes, {}, *factors)[2:])


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


def test_a_step_that_fills_the_cache_is_captured_in_a_graph() -> None:
    sizes = Sizes(1, 256, 8, 64, 16, 3)
    q_latent, q_rope, *rows = on_device(sizes, torch.bfloat16)
    fresh = [torch.randn(3, 1, x.shape[-1], device="cuda").to(x.dtype) for x in rows]
    angles = [torch.rand(3, 1, 16, device="cuda") for _ in range(2)]
    lengths = torch.tensor([9, 100, 255], device="cuda")

    def step(caches: list[Tensor]) -> Tensor:
        rope_and_append(*fresh, *angles, *caches, positions=lengths - 1)
        return latent_attention_decode(q_latent, q_rope, *caches, softmax_scale=0.2, lengths=lengths)[0]

    captured, expected = [x.clone() for x in rows], [x.clone() for x in rows]
    step([x.clone() for x in rows])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = step(captured)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, step(expected))
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
        lengths.add_(1).clamp_(max=256)


def test_a_page_that_does_not_exist_is_an_error_of_the_device() -> None:
    """In a process of its own: the kernel's stop ends all use of the GPU there."""
    program = (
        "import torch; from xeco_convert.ops import latent_attention_decode as decode\n"
        "x = lambda *shape: torch.ones(*shape, device='cuda', dtype=torch.bfloat16)\n"
        "table, lengths = torch.tensor([[0, 9]], dtype=torch.int32, device='cuda'), torch.tensor([20], device='cuda')\n"
        "decode(x(1, 1, 2, 16), x(1, 1, 2, 16), x(4, 16, 16), x(4, 16, 16), softmax_scale=1.0, block_table=table,\n"
        "       lengths=lengths)\n"
        "print('launched', flush=True)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "launched" in done.stdout and done.returncode != 0 and "CUDA error" in done.stderr, done.stderr


def test_the_ops_pass_opcheck_and_compile_whole() -> None:
    tensors = [x.requires_grad_() for x in on_device(COMMON, torch.bfloat16)]
    rule = (None, None, None, COMMON.softmax_scale, True, 0, 0.0)
    torch.library.opcheck(torch.ops.xeco.latent_attention, (*tensors, *rule), rtol=0.05, atol=0.05)

    def attend(*operands: Tensor) -> Tensor:
        return latent_attention(*operands, softmax_scale=COMMON.softmax_scale)[0]

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*tensors), attend(*tensors))


def test_a_stream_that_is_not_the_default_is_used() -> None:
    tensors = on_device(COMMON, torch.bfloat16)
    expected = latent_attention(*tensors, softmax_scale=COMMON.softmax_scale)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = latent_attention(*tensors, softmax_scale=COMMON.softmax_scale)[0]
    side.synchronize()
    assert torch.equal(result, expected)
