"""The references of latent_attention: against loops, and their gradients by finite differences in float64."""

from typing import Any

import pytest
import torch
from operands import Sizes, finite, inputs, schema_order
from torch import Tensor

from xeco_convert.ops import latent_attention
from xeco_convert.ops._latent_attention import latent_attention_backward_reference, latent_attention_reference


def run(tensors: list[Tensor], sizes: Sizes, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return latent_attention(*tensors, softmax_scale=sizes.softmax_scale, **rule)


class Formula(torch.autograd.Function):
    """The two references as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = latent_attention_reference(*arguments)
        ctx.save_for_backward(*arguments[:4], out, lse)
        ctx.rule = arguments[4:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        gradients = latent_attention_backward_reference(d_out, d_lse, *ctx.saved_tensors, *ctx.rule)
        return (*gradients, *(None,) * 7)


SMALL = Sizes(3, 6, 2, 4, 2)
SMALL_RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "everything": {"causal": False},
    "padding": {"starts": torch.tensor([0, 5]), "ends": torch.tensor([5, 6])},
    "positions and window": {"query_positions": torch.tensor([1, -1]), "window": 2},
    "soft-cap": {"softcap": 0.8},
}


@pytest.mark.parametrize("rule", SMALL_RULES)
def test_gradcheck_in_float64(rule: str) -> None:
    """Of the public function (torch differentiates the formula) and of the backward formula."""
    leaves = [tensor.requires_grad_() for tensor in inputs(SMALL, torch.float64)]
    arguments = schema_order(SMALL, SMALL_RULES[rule])

    def public(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(list(tensors), SMALL, SMALL_RULES[rule])
        return out, finite(lse)

    def formula(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = Formula.apply(*tensors, *arguments)
        return out, finite(lse)

    assert torch.autograd.gradcheck(public, leaves)
    assert torch.autograd.gradcheck(formula, leaves)


@pytest.mark.parametrize("rule", ["causal", "padding", "positions and window", "soft-cap"])
def test_the_reference_is_one_query_and_head_at_a_time(rule: str) -> None:
    """The reference itself, against loops that say which token is seen in words of their own."""
    options = SMALL_RULES[rule]
    q_latent, q_rope, c_kv, k_rope = inputs(SMALL, torch.float64)
    out, lse = run([q_latent, q_rope, c_kv, k_rope], SMALL, options)
    none = [None] * SMALL.B
    for b in range(SMALL.B):
        start = options.get("starts", none)[b] or 0
        end = SMALL.T if options.get("ends", none)[b] is None else options["ends"][b]
        first = SMALL.T - SMALL.Q if "query_positions" not in options else options["query_positions"][b]
        for q in range(SMALL.Q):
            seen = [t for t in range(SMALL.T) if start <= t < end and t <= first + q]
            seen = seen[-options["window"] :] if "window" in options and seen and seen[-1] == first + q else seen
            for h in range(SMALL.H):
                scores = (c_kv[b, seen] @ q_latent[b, q, h] + k_rope[b, seen] @ q_rope[b, q, h]) * SMALL.softmax_scale
                if "softcap" in options:
                    scores = options["softcap"] * torch.tanh(scores / options["softcap"])
                expected = scores.softmax(0) @ c_kv[b, seen] if seen else torch.zeros(SMALL.R, dtype=torch.float64)
                torch.testing.assert_close(out[b, q, h], expected, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(
                    lse[b, h, q], scores.logsumexp(0) if seen else torch.tensor(-torch.inf).double()
                )
