"""absorbed_attention against its reference and against the formula in float64; masks, awkward sizes, wrong shapes."""

import math

import pytest
import torch
from torch import Tensor

from xeco_convert.ops.torch_attention import absorbed_attention, causal_mask, reference_attention

RANK, ROPE, SCALE = 24, 8, 0.31
SIZES = [(1, 1), (1, 7), (1, 129), (7, 7), (5, 129), (129, 129), (2, 3)]


def inputs(
    queries: int, tokens: int, *, batch: int = 2, heads: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 1000 + tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        random(batch, queries, heads, RANK),
        random(batch, queries, heads, ROPE),
        random(batch, tokens, RANK),
        random(batch, tokens, ROPE),
    ]


def by_hand(q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, visible: Tensor) -> Tensor:
    """One query and head at a time, in float64; visible [B, H, Q, T] says what is added to each score (-inf: hidden)."""
    batch, queries, heads, _ = q_latent.shape
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                scores = c_kv[b].double() @ q_latent[b, q, h].double() + k_rope[b].double() @ q_rope[b, q, h].double()
                scores = scores * SCALE + visible[b, h, q].double()
                if scores.max() == -math.inf:
                    continue
                shares = (scores - scores.max()).exp()
                out[b, q, h] = (shares / shares.sum()) @ c_kv[b].double()
    return out


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def masks(queries: int, tokens: int, batch: int = 2, heads: int = 3) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Name -> (mask as it is given, what it adds to the scores [B, H, Q, T])."""
    full = (batch, heads, queries, tokens)
    causal = torch.tensor([[t <= tokens - queries + q for t in range(tokens)] for q in range(queries)])
    generator = torch.Generator().manual_seed(tokens)
    holes = torch.rand(batch, 1, queries, tokens, generator=generator) > 0.4
    holes[..., 0] = True
    weights = torch.randn(batch, heads, queries, tokens, generator=generator)
    return {
        "none": (None, additive(causal).expand(full)),
        "boolean": (holes, additive(holes).expand(full)),
        "boolean of a plane": (causal, additive(causal).expand(full)),
        "boolean of a row": (holes[:1, :, :1], additive(holes[:1, :, :1]).expand(full)),
        "additive": (additive(holes), additive(holes).expand(full)),
        "additive by head": (weights, weights),
    }


@pytest.mark.parametrize(("queries", "tokens"), SIZES)
@pytest.mark.parametrize("kind", masks(1, 1))
def test_both_implementations_follow_the_formula(queries: int, tokens: int, kind: str) -> None:
    given, added = masks(queries, tokens)[kind]
    tensors = inputs(queries, tokens)
    expected = by_hand(*tensors, added)
    fused = absorbed_attention(*tensors, softmax_scale=SCALE, attention_mask=given)
    plain, weights = reference_attention(*tensors, softmax_scale=SCALE, attention_mask=given)
    assert weights.shape == (2, 3, queries, tokens)
    for found in (fused, plain):
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 129), (7, 129)])
def test_in_float64_both_agree_to_the_last_digits(queries: int, tokens: int) -> None:
    tensors = inputs(queries, tokens, dtype=torch.float64)
    expected = by_hand(*tensors, masks(queries, tokens)["none"][1])
    torch.testing.assert_close(absorbed_attention(*tensors, softmax_scale=SCALE), expected, rtol=1e-12, atol=1e-12)
    found, _ = reference_attention(*tensors, softmax_scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "tokens"), [(1, 129), (7, 7), (5, 129)])
def test_in_bfloat16_the_fused_error_is_at_most_twice_the_plain_one(queries: int, tokens: int) -> None:
    tensors = inputs(queries, tokens, dtype=torch.bfloat16)
    expected = by_hand(*tensors, masks(queries, tokens)["none"][1])
    fused = absorbed_attention(*tensors, softmax_scale=SCALE)
    plain, _ = reference_attention(*tensors, softmax_scale=SCALE)
    assert fused.dtype == plain.dtype == torch.bfloat16
    errors = [(found.double() - expected).square().mean().sqrt() for found in (fused, plain)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("as_boolean", [True, False])
def test_a_query_that_may_attend_to_nothing_gets_zeros(queries: int, as_boolean: bool) -> None:
    tensors = inputs(queries, 6)
    mask = torch.ones(2, 1, queries, 6, dtype=torch.bool)
    mask[1, :, 0] = False
    given = mask if as_boolean else additive(mask)
    fused = absorbed_attention(*tensors, softmax_scale=SCALE, attention_mask=given)
    plain, weights = reference_attention(*tensors, softmax_scale=SCALE, attention_mask=given)
    for found in (fused, plain):
        assert not found[1, 0].any()
        assert bool(found.isfinite().all()) and bool(found[0].any())
    assert not weights[1, :, 0].any()


@pytest.mark.parametrize("queries", [1, 3])
def test_hidden_tokens_have_no_influence(queries: int) -> None:
    q_latent, q_rope, c_kv, k_rope = inputs(queries, 9)
    mask = torch.ones(2, 1, queries, 9, dtype=torch.bool)
    mask[..., :4] = False
    expected = absorbed_attention(q_latent, q_rope, c_kv, k_rope, softmax_scale=SCALE, attention_mask=mask)
    c_kv[:, :4], k_rope[:, :4] = 1e4, -1e4
    found = absorbed_attention(q_latent, q_rope, c_kv, k_rope, softmax_scale=SCALE, attention_mask=mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("queries", [1, 5])
def test_strided_views_give_what_their_copies_give(queries: int) -> None:
    q_latent, q_rope, c_kv, k_rope = inputs(queries, 7)
    wide = torch.cat([c_kv, k_rope], dim=-1).repeat(1, 2, 1)[:, ::2]
    expected = absorbed_attention(
        q_latent, q_rope, wide[..., :RANK].clone(), wide[..., RANK:].clone(), softmax_scale=SCALE
    )
    views = (q_latent.transpose(1, 2).contiguous().transpose(1, 2), q_rope, wide[..., :RANK], wide[..., RANK:])
    torch.testing.assert_close(absorbed_attention(*views, softmax_scale=SCALE), expected)


def test_gradients_are_those_of_the_reference() -> None:
    gradients = []
    for implementation in (absorbed_attention, lambda *a, **k: reference_attention(*a, **k)[0]):
        tensors = [tensor.requires_grad_() for tensor in inputs(4, 9, dtype=torch.float64)]
        implementation(*tensors, softmax_scale=SCALE).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_scales_what_is_kept() -> None:
    tensors = inputs(40, 40)
    torch.manual_seed(0)
    _, weights = reference_attention(*tensors, softmax_scale=SCALE, dropout=0.25)
    _, full = reference_attention(*tensors, softmax_scale=SCALE)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], full[kept] / 0.75)
    assert 0.7 < float(kept.sum() / (full != 0).sum()) < 0.8


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 3), (3, 3), (2, 4)])
def test_without_a_mask_the_last_query_sees_every_token(queries: int, tokens: int) -> None:
    mask = causal_mask(queries, tokens, torch.device("cpu"))
    assert mask.tolist() == [[t <= tokens - queries + q for t in range(tokens)] for q in range(queries)]


WRONG = {
    "queries of three dimensions": (0, (2, 3, RANK), "q_latent"),
    "another number of heads": (1, (2, 4, 5, ROPE), "q_latent"),
    "another number of queries": (1, (2, 5, 3, ROPE), "q_latent"),
    "a cache of four dimensions": (2, (2, 1, 9, RANK), "c_kv"),
    "another number of tokens": (3, (2, 8, ROPE), "c_kv"),
    "another rank": (2, (2, 9, RANK + 1), "rank or rope widths differ"),
    "another rotary width": (3, (2, 9, ROPE + 2), "rank or rope widths differ"),
}


@pytest.mark.parametrize("which", WRONG)
@pytest.mark.parametrize("implementation", [absorbed_attention, reference_attention])
def test_shapes_that_do_not_fit_are_refused(which: str, implementation: object) -> None:
    number, shape, sentence = WRONG[which]
    tensors = inputs(4, 9)
    tensors[number] = torch.zeros(shape)
    with pytest.raises(ValueError, match=sentence):
        implementation(*tensors, softmax_scale=SCALE)  # type: ignore[operator]


@pytest.mark.parametrize("implementation", [absorbed_attention, reference_attention])
def test_another_batch_is_refused(implementation: object) -> None:
    tensors = inputs(4, 9)
    tensors[2], tensors[3] = tensors[2][:1], tensors[3][:1]
    with pytest.raises(ValueError, match="batch"):
        implementation(*tensors, softmax_scale=SCALE)  # type: ignore[operator]
