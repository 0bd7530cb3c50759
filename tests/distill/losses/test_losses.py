"""Every chunked loss equals its plain formula, with its gradient, whatever the chunks; gradcheck in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.quality import OutputHead
from xeco_distill.losses import Loss
from xeco_distill.losses.chunked import Term, chunked_loss
from xeco_distill.losses.cross_entropy import CrossEntropy
from xeco_distill.losses.forward_kl import ForwardKL
from xeco_distill.losses.forward_kl_top_k import ForwardKLTopK
from xeco_distill.losses.jsd import JSD
from xeco_distill.losses.prediction import Prediction, TopKPrediction
from xeco_distill.losses.reverse_kl import ReverseKL

VOCABULARY, HIDDEN, TEACHER_HIDDEN, TOKENS = 29, 7, 5, 11


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def predictions(
    softcap: float | None = None,
    divisor: float = 1.0,
    bias: bool = False,
    *,
    vocabulary: int = VOCABULARY,
    hidden: int = HIDDEN,
    tokens: int = TOKENS,
) -> tuple[Prediction, Prediction]:
    head = OutputHead(
        weight=draw(vocabulary, hidden, seed=1),
        bias=draw(vocabulary, seed=5) if bias else None,
        softcap=softcap,
        divisor=divisor,
    )
    student = Prediction(hidden=draw(1, tokens, hidden, seed=2), head=head)
    teacher = Prediction(
        hidden=draw(1, tokens, TEACHER_HIDDEN, seed=3),
        head=OutputHead(weight=draw(vocabulary, TEACHER_HIDDEN, seed=4)),
    )
    return student, teacher


def forward_kl(student: Prediction, teacher: Prediction, mask: Tensor) -> Tensor:
    return chunked_loss([Term(name="kl", loss=ForwardKL())], student, teacher, mask).total


MASK = torch.tensor([[True, True, False, True, True, True, False, True, True, True, True]])
TARGETS = torch.arange(TOKENS)[None] * 5 % VOCABULARY


def plain_forward_kl(z_s: Tensor, z_t: Tensor, tau: float) -> Tensor:
    p, q = (z_t / tau).log_softmax(-1), (z_s / tau).log_softmax(-1)
    return tau**2 * functional.kl_div(q, p, log_target=True, reduction="sum")


def plain_reverse_kl(z_s: Tensor, z_t: Tensor, tau: float) -> Tensor:
    return plain_forward_kl(z_t, z_s, tau)


def plain_jsd(z_s: Tensor, z_t: Tensor, tau: float, beta: float) -> Tensor:
    p, q = (z_t / tau).softmax(-1), (z_s / tau).softmax(-1)
    m = beta * p + (1 - beta) * q
    return tau**2 * (beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum())


def plain_ce(z_s: Tensor, z_t: Tensor) -> Tensor:
    return functional.cross_entropy(z_s, TARGETS[MASK], reduction="sum")


Plain = Callable[[Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Loss, Plain]] = {
    "forward": (ForwardKL(), lambda s, t: plain_forward_kl(s, t, 1.0)),
    "forward, warm": (ForwardKL(temperature=2.0), lambda s, t: plain_forward_kl(s, t, 2.0)),
    "reverse": (ReverseKL(), lambda s, t: plain_reverse_kl(s, t, 1.0)),
    "reverse, cold": (ReverseKL(temperature=0.7), lambda s, t: plain_reverse_kl(s, t, 0.7)),
    "jsd": (JSD(), lambda s, t: plain_jsd(s, t, 1.0, 0.5)),
    "jsd, 0.1, warm": (JSD(jsd_beta=0.1, temperature=1.5), lambda s, t: plain_jsd(s, t, 1.5, 0.1)),
    "cross entropy": (CrossEntropy(), plain_ce),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [(None, None), (1, 1), (4, 8), (100, 100), (3, 29)])
def test_loss_and_gradients_equal_the_plain_formula(name: str, chunks: tuple[int | None, int | None]) -> None:
    loss, plain = CASES[name]
    student, teacher = predictions()
    hidden, weight = student.hidden.requires_grad_(True), student.head.weight.requires_grad_(True)
    found = chunked_loss(
        [Term(name=name, loss=loss, weight=0.3)],
        student,
        teacher,
        MASK,
        TARGETS,
        tokens_per_chunk=chunks[0],
        vocabulary_per_chunk=chunks[1],
    )
    expected = 0.3 * plain(student.head.logits(hidden)[MASK], teacher.head.logits(teacher.hidden)[MASK])
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.parts[name] * 0.3, expected)
    assert found.num_tokens == 9
    got = torch.autograd.grad(found.total * 2.5, [hidden, weight])
    torch.testing.assert_close(got, torch.autograd.grad(expected * 2.5, [hidden, weight]))


@pytest.mark.parametrize("name", [*CASES, "top-k"])
@pytest.mark.parametrize("kind", ["plain", "bias, softcap and divisor"])
def test_gradcheck(name: str, kind: str) -> None:
    """Three chunks of tokens and three of the vocabulary, the last ones shorter; no larger, since every weight is moved."""
    special = kind != "plain"
    few = {"vocabulary": 13, "hidden": 3, "tokens": 5}
    student, teacher = predictions(3.0 if special else None, 0.6 if special else 1.0, special, **few)
    mask, targets = MASK[:, :5], TARGETS[:, :5] % 13
    loss = ForwardKLTopK() if name == "top-k" else CASES[name][0]
    other = top_k(teacher, 6) if name == "top-k" else teacher

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        head = OutputHead(weight=weight, bias=bias, softcap=student.head.softcap, divisor=student.head.divisor)
        prediction = Prediction(hidden=hidden, head=head)
        return chunked_loss(
            [Term(name="it", loss=loss)], prediction, other, mask, targets, tokens_per_chunk=2, vocabulary_per_chunk=5
        ).total

    bias = None if student.head.bias is None else student.head.bias.requires_grad_(True)
    arguments = (student.hidden.requires_grad_(True), student.head.weight.requires_grad_(True), bias)
    assert torch.autograd.gradcheck(call, arguments)


def top_k(teacher: Prediction, k: int) -> TopKPrediction:
    logp, ids = teacher.head.logits(teacher.hidden).log_softmax(-1).topk(k)
    return TopKPrediction(ids=ids, log_probabilities=logp)


def test_top_k_grows_to_the_whole_divergence_and_never_exceeds_it() -> None:
    student, teacher = predictions()
    whole = forward_kl(student, teacher, MASK)
    sums = [
        chunked_loss([Term(name="k", loss=ForwardKLTopK())], student, top_k(teacher, k), MASK).total
        for k in (1, 5, 20, VOCABULARY)
    ]
    assert all(low <= high for low, high in zip(sums, [*sums[1:], whole + 1e-12], strict=True))
    torch.testing.assert_close(sums[-1], whole)
    assert sums[0] < 0.9 * whole


def test_a_mix_of_losses_at_different_temperatures_is_their_weighted_sum() -> None:
    student, teacher = predictions()
    hidden, weight = student.hidden.requires_grad_(True), student.head.weight.requires_grad_(True)
    terms = [
        Term(name="kl", loss=ForwardKL(temperature=2.0), weight=0.9),
        Term(name="ce", loss=CrossEntropy(), weight=0.1),
    ]
    found = chunked_loss(terms, student, teacher, MASK, TARGETS, tokens_per_chunk=2, vocabulary_per_chunk=7)
    z_s, z_t = student.head.logits(hidden)[MASK], teacher.head.logits(teacher.hidden)[MASK]
    expected = 0.9 * plain_forward_kl(z_s, z_t, 2.0) + 0.1 * plain_ce(z_s, z_t)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight])
    )


def test_nothing_masked_in_gives_zero_and_zero_gradients() -> None:
    student, teacher = predictions()
    student.hidden.requires_grad_(True)
    found = forward_kl(student, teacher, torch.zeros_like(MASK))
    found.backward()
    assert found == 0 and torch.equal(student.hidden.grad, torch.zeros_like(student.hidden))


def test_masked_out_tokens_are_not_looked_at() -> None:
    student, teacher = predictions()
    expected = forward_kl(student, teacher, MASK)
    student.hidden[~MASK] = torch.nan
    teacher.hidden[~MASK] = torch.nan
    torch.testing.assert_close(forward_kl(student, teacher, MASK), expected)


def test_equal_models_have_no_divergence() -> None:
    _, teacher = predictions()
    for loss in (ForwardKL(), ReverseKL(), JSD()):
        found = chunked_loss([Term(name="it", loss=loss)], teacher, teacher, MASK)
        assert abs(float(found.total)) < 1e-12


def test_bfloat16_is_as_close_to_float64_as_the_plain_formula_in_bfloat16() -> None:
    student, teacher = predictions()
    exact_hidden = student.hidden.clone().requires_grad_(True)
    exact = plain_forward_kl(student.head.logits(exact_hidden)[MASK], teacher.head.logits(teacher.hidden)[MASK], 1.0)
    wanted = torch.autograd.grad(exact, exact_hidden)[0]
    errors = []
    for chunked in (True, False):
        hidden = student.hidden.bfloat16().requires_grad_(True)
        half = Prediction(hidden=hidden, head=student.head.cast(torch.bfloat16))
        other = Prediction(hidden=teacher.hidden.bfloat16(), head=teacher.head.cast(torch.bfloat16))
        if chunked:
            total = chunked_loss([Term(name="kl", loss=ForwardKL())], half, other, MASK, tokens_per_chunk=3).total
        else:
            z_s, z_t = half.head.logits(hidden).float()[MASK], other.head.logits(other.hidden).float()[MASK]
            total = plain_forward_kl(z_s, z_t, 1.0)
        gradient = torch.autograd.grad(total, hidden)[0]
        errors.append(float((gradient.double() - wanted).norm()))
    assert errors[0] <= 2 * errors[1]


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights() -> None:
    student, teacher = predictions()
    hidden, weight = student.hidden.float().requires_grad_(True), student.head.weight.float().requires_grad_(True)
    prediction = Prediction(hidden=hidden, head=OutputHead(weight=weight))
    other = Prediction(hidden=teacher.hidden.float(), head=teacher.head.cast(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = forward_kl(prediction, other, MASK)
    total.backward()
    assert total.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.float32
    expected = forward_kl(*predictions(), MASK)
    assert abs(float(total) / float(expected) - 1) < 0.02  # 0.004 was observed


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, teacher = predictions()
    with pytest.raises(ValueError, match="mask: expected bool"):
        forward_kl(student, teacher, MASK[:, 1:])
    with pytest.raises(ValueError, match="teacher: expected predictions for"):
        forward_kl(student, Prediction(hidden=teacher.hidden[:, 1:], head=teacher.head), MASK)
    with pytest.raises(ValueError, match="vocabulary of 29, found 28"):
        forward_kl(student, Prediction(hidden=teacher.hidden, head=teacher.head.first(28)), MASK)
