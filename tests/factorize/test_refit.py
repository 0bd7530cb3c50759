"""The refit of the value side: least squares on what it is given, never worse there, exact where it can be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import random_attention
from calibrated_layers import calibrated, context_of, gaussian_inputs, output_error, source_output

from xeco_convert.factorize import MlaAttention, SourceAttention, refit
from xeco_convert.factorize.attention import AttentionContext, mla_output
from xeco_convert.factorize.refit import ValueRefit

Target = torch.Tensor | None
BRANCHES = {"joint": 8192, "o_proj alone": 1}


@pytest.fixture(params=BRANCHES.values(), ids=BRANCHES)
def joint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both branches: W_UV and o_proj together, or o_proj alone."""
    monkeypatch.setattr(refit, "_MOST_FEATURES", request.param)
    return bool(request.param == BRANCHES["joint"])


def refitted(
    source: SourceAttention, mla: MlaAttention, x: torch.Tensor, context: AttentionContext, target: Target = None
) -> MlaAttention:
    fit = ValueRefit(mla, source.num_attention_heads, context)
    fit.add(
        x, torch.ones(x.shape[:2], dtype=torch.bool), source_output(source, x, context) if target is None else target
    )
    return fit.result()


@pytest.mark.parametrize("bias", ["", "qkvo"])
@pytest.mark.parametrize(("rank", "rope"), [(2, 2), (6, 4), (12, 8)])
def test_the_error_on_the_fitted_tokens_never_grows(joint: bool, bias: str, rank: int, rope: int) -> None:
    source, x = random_attention(4, 2, bias=bias), gaussian_inputs(windows=16)
    context = context_of(source)
    start = calibrated(source, x, context).factors(rank, rope)
    result = refitted(source, start, x, context)
    assert output_error(source, result, x, context) < output_error(source, start, x, context)
    # keys, queries and latent stay
    for name in ("q_weight", "kv_a_weight", "kv_a_bias", "o_bias", "rope_index"):
        assert getattr(result, name) is getattr(start, name)
    rows, before = (mla.kv_b_weight.view(4, 16, rank) for mla in (result, start))
    assert torch.equal(rows[:, :8], before[:, :8])
    assert torch.equal(rows[:, 8:], before[:, 8:]) is not joint


def test_an_exact_layer_stays_exact(joint: bool) -> None:
    source, x = random_attention(4, 2, bias="qkvo"), gaussian_inputs(windows=16)
    context = context_of(source)
    result = refitted(source, calibrated(source, x, context).factors(32, 16), x, context)
    fresh = gaussian_inputs(windows=4, seed=2)
    torch.testing.assert_close(
        mla_output(result, 4, fresh, context), source_output(source, fresh, context), rtol=1e-7, atol=1e-7
    )


def test_a_reachable_target_is_recovered(joint: bool) -> None:
    """The output of the same heads with another value side. The pull of the smallest ridge towards the start, a thousandth
    of the features' mean square, is what is left."""
    source, x = random_attention(4, 2, bias="qkvo"), gaussian_inputs(windows=64)
    context = context_of(source)
    start = calibrated(source, x, context).factors(6, 4)
    generator = torch.Generator().manual_seed(4)

    def noise(weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.2 * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    goal = dataclasses.replace(start, o_weight=noise(start.o_weight))
    if joint:
        rows = noise(start.kv_b_weight).view(4, 16, 6)
        kept = start.kv_b_weight.view(4, 16, 6)
        goal = dataclasses.replace(goal, kv_b_weight=torch.cat([kept[:, :8], rows[:, 8:]], dim=1).reshape(64, 6))
    target = mla_output(goal, 4, x, context)
    result = refitted(source, start, x, context, target)
    left = (mla_output(result, 4, x, context) - target).square().sum()
    assert left < 0.01 * (mla_output(start, 4, x, context) - target).square().sum()


def test_uncounted_tokens_do_not_take_part(joint: bool) -> None:
    source, x = random_attention(4, 2, bias="qkvo"), gaussian_inputs()
    context = context_of(source)
    start = calibrated(source, x, context).factors(6, 4)
    counts = torch.ones(8, 12, dtype=torch.bool)
    counts[:, 9:] = False
    results = []
    for inputs in (x, torch.cat([x[:, :9], x[:, 9:] * 50], dim=1)):
        fit = ValueRefit(start, 4, context)
        fit.add(inputs, counts, source_output(source, inputs, context))
        results.append(fit.result())
    torch.testing.assert_close(results[0].o_weight, results[1].o_weight)
    torch.testing.assert_close(results[0].kv_b_weight, results[1].kv_b_weight)
    shorter = ValueRefit(start, 4, context_of(source, 9))
    shorter.add(x[:, :9], counts[:, :9], source_output(source, x[:, :9], context_of(source, 9)))
    torch.testing.assert_close(results[0].o_weight, shorter.result().o_weight)


def test_a_weight_of_two_counts_a_token_twice(joint: bool) -> None:
    source, x = random_attention(4, 2, bias="qkvo"), gaussian_inputs()
    context = context_of(source)
    start, target = calibrated(source, x, context).factors(6, 4), source_output(source, x, context)
    counts, weights = torch.ones(8, 12, dtype=torch.bool), torch.ones(8, 12, dtype=x.dtype)
    weights[5:] = 2.0
    weighed, repeated = (ValueRefit(start, 4, context) for _ in range(2))
    weighed.add(x, counts, target, weights)
    repeated.add(x, counts, target)
    repeated.add(x[5:], counts[5:], target[5:])
    for name in ("o_weight", "kv_b_weight"):
        torch.testing.assert_close(getattr(weighed.result(), name), getattr(repeated.result(), name))


def chosen_ridge(source: SourceAttention, held_out_noise: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """The ridge that the last solve takes: for targets that are the start's output, those of the fit with noise; or, without
    noise, twice that."""
    context = context_of(source)
    start = calibrated(source, gaussian_inputs(windows=16), context).factors(6, 4)
    solve, seen = refit._Moments.solve, []

    def spy(moments: refit._Moments, ridge: float, prior: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(ridge)
        return solve(moments, ridge, prior)

    monkeypatch.setattr(refit._Moments, "solve", spy)
    fit = ValueRefit(start, 4, context)
    few = 4 if held_out_noise else 64
    x, held_out = gaussian_inputs(windows=few, seed=5), gaussian_inputs(windows=8, seed=6)
    generator = torch.Generator().manual_seed(1)
    targets = [mla_output(start, 4, part, context) for part in (x, held_out)]
    if held_out_noise:
        targets[0] = targets[0] + held_out_noise * torch.randn(targets[0].shape, generator=generator).double()
    else:
        targets = [2 * target for target in targets]
    fit.add(x, torch.ones(few, 12, dtype=torch.bool), targets[0])
    fit.add(held_out, torch.ones(8, 12, dtype=torch.bool), targets[1], held_out=True)
    fit.result()
    assert sorted(seen[:-1]) == sorted(refit._RIDGES)
    return seen[-1]


def test_held_out_windows_choose_the_ridge(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fitted targets are the start's output and noise, the strongest pull to the start is best; where they are
    twice that, the weakest."""
    source = random_attention(4, 2)
    with monkeypatch.context() as patch:
        assert chosen_ridge(source, 1.0, patch) == max(refit._RIDGES)
    assert chosen_ridge(source, 0.0, monkeypatch) == min(refit._RIDGES)


def test_without_held_out_windows_the_smallest_ridge_is_taken(joint: bool) -> None:
    source, x = random_attention(4, 2), gaussian_inputs(windows=32)
    context = context_of(source)
    start = calibrated(source, x, context).factors(6, 4)
    result = refitted(source, start, x, context)
    fit = ValueRefit(start, 4, context)
    fit.add(x, torch.ones(32, 12, dtype=torch.bool), source_output(source, x, context))
    solution, _ = fit._fitted.solve(min(refit._RIDGES), fit._prior())
    if joint:  # a head's map from latent to output has at most rank 6 here: W_UV and o_proj hold it exactly
        w_uv = result.kv_b_weight.view(4, 16, 6)[:, 8:]
        found = torch.einsum("hvr,xhv->hrx", w_uv, result.o_weight.unflatten(1, (4, 8))).flatten(0, 1)
    else:
        found = result.o_weight.T
    torch.testing.assert_close(found, solution, rtol=1e-7, atol=1e-9)


def test_a_truncated_joint_refit_is_close_to_the_full_map() -> None:
    """rank 12 above v_head_dim 8: each head's map is cut in the metric of its latents, and still beats o_proj alone."""
    source, x = random_attention(4, 2), gaussian_inputs(windows=64)
    context = context_of(source)
    start = calibrated(source, x, context).factors(12, 4)
    together = refitted(source, start, x, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "_MOST_FEATURES", 1)
        alone = refitted(source, start, x, context)
    assert output_error(source, together, x, context) < output_error(source, alone, x, context)


def test_the_dtype_of_the_layer_is_kept(joint: bool) -> None:
    source, x = random_attention(4, 2, dtype=torch.float32), gaussian_inputs().float()
    context = context_of(source)
    context = dataclasses.replace(context, cos=context.cos.float(), sin=context.sin.float())
    start = calibrated(source, x, context).factors(6, 4).to(torch.float32)
    result = refitted(source, start, x, context)
    assert {tensor.dtype for tensor in result.tensors().values()} == {torch.float32}
