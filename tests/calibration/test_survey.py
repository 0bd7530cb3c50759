"""The survey measures what each width costs: prices from KL at the output, errors with what refinement leaves of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from calibrated_layers import source_output
from sources import plan_for, random_windows

from xeco_convert.calibration import survey as surveying
from xeco_convert.calibration.stream import SourceStream
from xeco_convert.calibration.survey import (
    Survey,
    best_of_size,
    interpolated,
    probed_offers,
    refined_errors,
)
from xeco_convert.factorize.attention import mla_output
from xeco_convert.factorize.closed_form import CalibratedLayer
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.factorize.statistics import StatisticsAccumulator
from xeco_convert.ranks import Widths
from xeco_convert.source_attention import read_attention

CPU = torch.device("cpu")


def offer(rank: int, rope: int) -> Widths:
    return Widths(kv_lora_rank=rank, qk_rope_head_dim=rope)


def numbers(widths: Widths) -> float:
    """A size for those who count numbers."""
    return widths.total


OFFERS = (offer(4, 2), offer(6, 4), offer(8, 2), offer(12, 4), offer(16, 8))


def surveyed(llama: Path, share: float | None = None) -> tuple[list[dict[Widths, float]], Survey]:
    """Costs of all layers; with `share`, as if refinement left that share of every layer's error and changed nothing."""
    plan, windows = plan_for(llama), random_windows(8, 24)
    stream = SourceStream(plan.source, windows, CPU)
    survey = Survey(OFFERS, 10, [item.layer for item in plan.converted], windows, numbers)
    for view in stream.layers():
        survey.advance_branches(view)
        source = read_attention(plan.source, stream._reader, view.number, CPU)
        with torch.no_grad():
            statistics = StatisticsAccumulator(source, view.context())
            statistics.add(view.normed(view.inputs), view.counts)
        layer = CalibratedLayer(source, statistics.result(), view.softmax_scale)

        def unchanged(factors: MlaAttention) -> tuple[MlaAttention, float]:
            assert share is not None
            return factors, share

        survey.add(view, source, layer, None if share is None else unchanged)
    return survey.costs(view.outputs, stream.output_head()), survey


@pytest.mark.parametrize("deep", [False, True])
def test_the_cost_of_the_branch_is_its_kl_at_the_output(
    deep: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 alone converted at the branch's widths, and run by hand; half of half of the windows in deep models."""
    monkeypatch.setattr(surveying, "_BRANCH_TOKENS", 8 * 24)
    if deep:
        monkeypatch.setattr(surveying, "_DEEP", 2)
    costs, survey = surveyed(llama)
    plan, windows = plan_for(llama), random_windows(8, 24)
    branch = best_of_size(survey._layers[1].errors, 10, numbers)
    assert branch.total == 10
    stream, hidden = SourceStream(plan.source, windows, CPU), torch.empty(0)
    for view in stream.layers():
        with torch.no_grad():
            if view.number == 1:
                source = read_attention(plan.source, stream._reader, 1, CPU)
                statistics = StatisticsAccumulator(source, view.context())
                statistics.add(view.normed(view.inputs), view.counts)
                layer = CalibratedLayer(source, statistics.result(), view.softmax_scale)
                mla = layer.factors(branch.kv_lora_rank, branch.qk_rope_head_dim).to(torch.float32)
                output = mla_output(mla, 4, view.normed(view.inputs), view.context())
                target = source_output(source, view.normed(view.inputs), view.context())
                # tokens count by the inverse mean square of what the next norm sees
                weights = 1 / (view.inputs + target).square().mean(dim=-1, keepdim=True)
                error = float((weights * (output - target).square()).sum() / (weights * target.square()).sum())
                hidden = view.run_with_attention(view.inputs, output)
            elif view.number > 1:
                hidden = view.run(hidden)
    part = (slice(4), slice(12)) if deep else (slice(8), slice(24))
    assert survey._branches[1].shape[:2] == (part[0].stop, part[1].stop)
    logp, other = (stream.output_head().logits(states[part]).log_softmax(dim=-1) for states in (view.outputs, hidden))
    by_token = torch.nn.functional.kl_div(other, logp, log_target=True, reduction="none").sum(dim=-1).flatten()
    kl = float(by_token.clamp_max(by_token.quantile(0.975)).mean())  # no token decides alone
    assert costs[1][branch] == pytest.approx(kl, rel=1e-3)
    assert survey._layers[1].errors[branch] == pytest.approx(error, rel=1e-4)
    for found, layer_costs in zip(survey._layers.values(), costs, strict=True):
        ratios = [layer_costs[each] / found.errors[each] for each in OFFERS]
        assert max(ratios) == pytest.approx(min(ratios))


def test_what_refinement_leaves_everywhere_alike_changes_no_cost(llama: Path) -> None:
    """Branches are as they were, so that errors of a third have prices of three times."""
    plain, thirds = surveyed(llama)[0], surveyed(llama, 1 / 3)[0]
    for before, after in zip(plain, thirds, strict=True):
        assert after == pytest.approx(before, rel=1e-6)


def test_beyond_the_most_branches_prices_are_interpolated(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = surveyed(llama)
    monkeypatch.setattr(surveying, "_MOST_BRANCHES", 2)
    costs, survey = surveyed(llama)
    assert set(survey._branches) == {0, 2}
    prices = [layer[OFFERS[0]] / survey._layers[number].errors[OFFERS[0]] for number, layer in enumerate(costs)]
    assert prices[1] == pytest.approx(math.sqrt(prices[0] * prices[2]))
    assert costs[0] == whole[0] and costs[2] == whole[2]


def test_probes_are_the_best_of_a_few_totals_with_the_branch_first() -> None:
    errors = {offer(rank, rope): 1 / (rank + 2 * rope) for rank in range(4, 40, 4) for rope in (2, 4)}
    branch = best_of_size(errors, 20, numbers)
    chosen = probed_offers(errors, branch, numbers)
    assert chosen[0] == branch and len(chosen) == len({each.total for each in chosen}) == surveying._MOST_PROBES
    totals = [each.total for each in errors]
    assert {min(totals), max(totals)} <= {each.total for each in chosen}
    assert all(errors[each] == min(errors[other] for other in errors if other.total == each.total) for each in chosen)
    assert probed_offers({branch: 1.0}, branch, numbers) == [branch]


def test_shares_between_probes_are_interpolated() -> None:
    errors = {offer(4, 2): 0.8, offer(8, 2): 0.4, offer(12, 2): 0.2, offer(16, 2): 0.1}
    found = refined_errors(errors, {offer(4, 2): 0.25, offer(12, 2): 1.0}, numbers)
    assert found[offer(4, 2)] == pytest.approx(0.2) and found[offer(8, 2)] == pytest.approx(0.2)
    assert found[offer(12, 2)] == pytest.approx(0.2) and found[offer(16, 2)] == pytest.approx(0.1)
    assert interpolated({0: 0.0, 4: 2.0}, 1) == pytest.approx(0.5)
