"""The refit of the score side: the derivative is the output's, a truth in its span is recovered, the error falls."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs, output_error, source_output

from xeco_convert.factorize import MlaAttention, SourceAttention, refit_scores
from xeco_convert.factorize.attention import AttentionContext, mla_output, split_up_projection
from xeco_convert.factorize.refit_scores import ScoreRefit, ScoreTokens

WINDOWS = 8


def tokens(
    x: torch.Tensor, target: torch.Tensor, counts: torch.Tensor | None = None, pieces: int = 4
) -> list[ScoreTokens]:
    """Windows in `pieces` parts."""
    counted = torch.ones(x.shape[:2], dtype=torch.bool) if counts is None else counts
    parts = zip(x.chunk(pieces), counted.chunk(pieces), target.chunk(pieces), strict=True)
    return [ScoreTokens(inputs=inputs, weights=each.to(x.dtype), target=wanted) for inputs, each, wanted in parts]


def random_change(refit: ScoreRefit, size: float) -> refit_scores._Change:
    """Noise of `size` times the weights' own spread."""
    generator = torch.Generator().manual_seed(3)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return size * like.std() * torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return refit_scores._Change(noise(refit._w_uk), noise(refit._q_HQY))


def prepared(
    bias: str = "", *, q_rank: int | None = None, latent_norm: bool = False, window: int | None = None
) -> tuple[SourceAttention, torch.Tensor, AttentionContext, MlaAttention]:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs(windows=WINDOWS)
    context = context_of(source, window=window)
    layer = calibrated(source, x, context, with_inputs=True)
    return source, x, context, layer.factors(9, 4, q_lora_rank=q_rank, latent_norm=latent_norm)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": "qkvo", "window": 5}, {"q_rank": 12}, {"latent_norm": True, "bias": "qkv"}],
    ids=["plain", "biases and a sliding window", "factorised queries", "latent norm"],
)
def test_the_derivative_is_that_of_the_output_and_its_adjoint_fits(settings: dict) -> None:  # type: ignore[type-arg]
    _, x, context, start = prepared(**settings)
    target = torch.zeros_like(x)
    refit = ScoreRefit(start, 4, context, tokens(x, target, pieces=1))
    (part,) = refit._parts
    change, view = random_change(refit, 1.0), refit._look(part)
    pushed = refit._push(view, change)
    size = 1e-4
    ahead, behind = (mla_output(refit._changed(change, step), 4, x, context) for step in (size, -size))
    torch.testing.assert_close((ahead - behind) / (2 * size), pushed, rtol=1e-4, atol=1e-5)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    assert refit._pull_back(view, other).dot(change) == pytest.approx(float((other * pushed).sum()), rel=1e-9)


@pytest.mark.parametrize("q_rank", [None, 12])
def test_a_truth_in_the_span_is_recovered(q_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is the layer with other W_UK and queries. Each round is linear about the last one's result; with hardly
    any ridge and enough iterations they converge to it, as the Gauss-Newton method does."""
    monkeypatch.setattr(refit_scores, "_RIDGE", 1e-8)
    monkeypatch.setattr(refit_scores, "_DAMPING", 1e-6)
    monkeypatch.setattr(refit_scores, "_OFFERED", (40, 120))
    _, x, context, start = prepared("qkv", q_rank=q_rank)
    shifted = ScoreRefit(start, 4, context, [])
    target = mla_output(shifted._changed(random_change(shifted, 0.02), 1.0), 4, x, context)

    def left(mla: MlaAttention) -> float:
        return float((mla_output(mla, 4, x, context) - target).square().sum())

    found, before = start, left(start)
    for _ in range(5):
        found = min(ScoreRefit(found, 4, context, tokens(x, target)).offers(), key=left)
    assert left(found) < 1e-4 * before


@pytest.mark.parametrize("bias", ["", "qkvo"])
def test_the_error_falls_and_nothing_else_changes(bias: str) -> None:
    source, x, context, start = prepared(bias)
    target = source_output(source, x, context)
    offers = list(ScoreRefit(start, 4, context, tokens(x, target)).offers())
    assert len(offers) == len(refit_scores._OFFERED) * len(refit_scores._STEPS)
    errors = [output_error(source, mla, x, context) for mla in offers]
    assert min(errors) < 0.9 * output_error(source, start, x, context)
    for mla in offers:
        for name in ("kv_a_weight", "kv_a_bias", "o_weight", "o_bias", "q_bias", "rope_index"):
            assert getattr(mla, name) is getattr(start, name)
        assert torch.equal(split_up_projection(mla, 4)[1], split_up_projection(start, 4)[1])


def test_an_exact_layer_stays_exact() -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=WINDOWS)
    context = context_of(source)
    start = calibrated(source, x, context).factors(32, 16)
    target = source_output(source, x, context)
    for mla in ScoreRefit(start, 4, context, tokens(x, target)).offers():
        torch.testing.assert_close(mla_output(mla, 4, x, context), target, rtol=1e-7, atol=1e-7)


def test_uncounted_tokens_and_the_cut_into_parts_do_not_matter() -> None:
    source, x, context, start = prepared()
    counts = torch.ones(WINDOWS, 12, dtype=torch.bool)
    counts[:, 9:] = False
    target = source_output(source, x, context)
    wrong = target.clone()
    wrong[:, 9:] = 100.0
    cases = [tokens(x, target, counts, 1), tokens(x, wrong, counts, 8)]
    first, second = (next(ScoreRefit(start, 4, context, parts).offers()) for parts in cases)
    torch.testing.assert_close(first.q_weight, second.q_weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(first.kv_b_weight, second.kv_b_weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("what", ["queries", "values"])
def test_scores_that_do_not_matter_stay_finite(what: str) -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=WINDOWS)
    name = {"queries": "q_weight", "values": "v_weight"}[what]
    source = dataclasses.replace(source, **{name: torch.zeros_like(getattr(source, name))})
    context = context_of(source)
    start = calibrated(source, x, context).factors(9, 4)
    for mla in ScoreRefit(start, 4, context, tokens(x, source_output(source, x, context))).offers():
        assert all(bool(tensor.isfinite().all()) for tensor in mla.tensors().values())
