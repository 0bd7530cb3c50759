"""The ops as torch knows them: opcheck, one graph under torch.compile, no gradients where there are none."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operands import COMMON, DTYPES, RULES, Sizes, inputs, schema_order
from torch import Tensor

from xeco_convert.ops import latent_attention, latent_attention_decode, rope_and_append

BACKENDS = ["aot_eager"] + (["inductor"] if shutil.which("g++") else [])


def append_arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    """c_kv, k_rope, cos, sin, caches of 9 slots, no table, positions."""
    shapes = [(2, 3, 16), (2, 3, 8), (1, 3, 8), (1, 3, 8), (2, 9, 16), (2, 9, 8)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    return [*tensors, None, torch.tensor([0, 6])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["causal", "window, padding and positions", "soft-cap"])
def test_opcheck_of_latent_attention(dtype: torch.dtype, rule: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(COMMON, dtype)]
    torch.library.opcheck(torch.ops.xeco.latent_attention.default, (*leaves, *schema_order(COMMON, RULES[rule])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lse", [True, False])
def test_opcheck_of_the_backward_op(dtype: torch.dtype, with_lse: bool) -> None:
    tensors, rule = inputs(COMMON, dtype), schema_order(COMMON, {})
    out, lse = torch.ops.xeco.latent_attention(*tensors, *rule)
    arguments = (torch.ones_like(out), torch.ones_like(lse) if with_lse else None, *tensors, out, lse, *rule)
    torch.library.opcheck(torch.ops.xeco.latent_attention_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_decode(dtype: torch.dtype) -> None:
    tensors = inputs(COMMON, dtype)
    lengths, table = torch.tensor([129, 60]), torch.tensor([[0], [1]], dtype=torch.int32)
    for block_table in (None, table):
        arguments = (*tensors, block_table, None, lengths, 0.3, 0, 0.0, 0)
        torch.library.opcheck(torch.ops.xeco.latent_attention_decode.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_rope_and_append(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.xeco.rope_and_append.default, append_arguments(dtype))


def training_step(*leaves: Tensor) -> list[Tensor]:
    out, lse = latent_attention(*leaves, softmax_scale=0.3, window=40)
    return [out * 2, lse + 1]


def decode_step(c_kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
    latents, keys, q_latent, q_rope, positions = rest
    rope_and_append(c_kv, k_rope, cos, sin, latents, keys, positions=positions)
    out, lse = latent_attention_decode(
        q_latent, q_rope, latents, keys, softmax_scale=0.3, lengths=positions + c_kv.shape[1]
    )
    return out.sum(dim=1) + lse.sum()


def compiled(function: Callable[..., Any], backend: str, dynamic: bool) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_forward_and_backward_compile_to_one_graph(backend: str, dynamic: bool) -> None:
    step = compiled(training_step, backend, dynamic)
    for sizes in (COMMON, Sizes(9, 65, 3, 24, 8)) if dynamic else (COMMON,):
        leaves = [tensor.requires_grad_() for tensor in inputs(sizes)]
        expected, found = training_step(*leaves), step(*leaves)
        weights = [torch.full_like(result, 0.7) for result in expected]
        gradients = [torch.autograd.grad(results, leaves, weights) for results in (found, expected)]
        for one, other in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_appending_and_decoding_compile_to_one_graph(backend: str) -> None:
    step = compiled(decode_step, backend, False)
    results = []
    for function in (decode_step, step):
        *tensors, _, positions = append_arguments()
        q_latent, q_rope, _, _ = inputs(Sizes(3, 9, 3, 16, 8))
        with torch.no_grad():
            out = function(*tensors, q_latent, q_rope, positions)
        results.append([out, *tensors[4:]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused_while_tracing() -> None:
    tensors = inputs(COMMON)
    tensors[3] = tensors[3][:, :-1]
    with pytest.raises(Exception, match=r"k_rope: expected \[B, T, P\] = \[2, 129, 8\], got \[2, 128, 8\]"):
        compiled(training_step, "aot_eager", False)(*tensors)


def test_results_on_the_meta_device_have_shapes_and_dtypes_alone() -> None:
    tensors = [tensor.to("meta") for tensor in inputs(COMMON, torch.bfloat16)]
    out, lse = latent_attention(*tensors, softmax_scale=0.3)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 7, 3, 24), torch.bfloat16, (2, 3, 7), torch.float32)
