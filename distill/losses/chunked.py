"""The one loop over tokens and vocabulary that all losses share.

Logits exist for a few tokens at a time; everything done to them elementwise goes through slabs of the vocabulary that fit a
cache, so no temporary is larger than a slab. The gradient with respect to hidden states and head is made in the same pass,
while the logits are there: no projection is computed twice, and backward only multiplies by a number.

Letters: N tokens, n tokens of a chunk, X hidden_size, V vocabulary, v entries of a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xeco_convert.quality import OutputHead

from .loss import Loss
from .prediction import Prediction, TopKPrediction

# Logits of one chunk, in numbers: 128 tokens of a vocabulary of 128k on a CPU (64 MiB in float32), 1024 on a GPU, whose
# matrix units want taller matrices.
_CHUNK_NUMBERS = {"cpu": 2**24}
_CHUNK_NUMBERS_GPU = 2**27
_SLAB_WIDTH = {"cpu": 4096}
_SLAB_WIDTH_GPU = 2**15
# The gradient of a trained head is as large as the head in float32, and every chunk adds to all of it: chunks of up to four
# times as many tokens spare most of that. More than a quarter of hidden_size spares little.
_TALLEST_WITH_TRAINED_HEAD = 4
_TALL_ENOUGH = 4


class Chunk:
    """Logits of n tokens at one temperature: those of the student, and what the teacher says.

    Log-sum-exps are [n], in float32 or float64; `targets` [n] int64 are the tokens that follow.
    """

    def __init__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        top_k: TopKPrediction | None,
        targets: Tensor | None,
        temperature: float,
        slab_width: int,
    ) -> None:
        self.student_logits = student_logits
        self.teacher_logits = teacher_logits
        self.top_k = top_k
        self._targets = targets
        self.temperature = temperature
        self._slab_width = slab_width
        self.dtype = torch.promote_types(student_logits.dtype, torch.float32)

    @property
    def targets(self) -> Tensor:
        if self._targets is None:
            raise ValueError("this loss needs targets")
        return self._targets

    @cached_property
    def student_lse(self) -> Tensor:
        return self._log_sum_exp(self.student_logits)

    @cached_property
    def teacher_lse(self) -> Tensor:
        return self._log_sum_exp(self._teacher)

    @property
    def _teacher(self) -> Tensor:
        if self.teacher_logits is None:
            raise ValueError("this loss needs a teacher's logits")
        return self.teacher_logits

    def slabs(self) -> Iterator[Slab]:
        """The vocabulary in order, a slab at a time."""
        for start in range(0, self.student_logits.shape[1], self._slab_width):
            yield Slab(self, slice(start, min(start + self._slab_width, self.student_logits.shape[1])))

    def sum_over_vocabulary(self, of_slab: Callable[[Slab], Tensor]) -> Tensor:
        """Sum [n] over the vocabulary of what `of_slab` gives [n, v], a slab at a time."""
        return torch.stack([of_slab(slab).sum(dim=1) for slab in self.slabs()]).sum(dim=0)

    def tempered(self, logits: Tensor) -> Tensor:
        """Logits in computing precision, divided by the temperature."""
        logits = logits.to(self.dtype)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def student_log_probabilities_of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n, K] of tokens [n, K]."""
        return self.tempered(self.student_logits.gather(1, ids)) - self.student_lse[:, None]

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        parts = [torch.logsumexp(self.tempered(logits[:, slab.columns]), dim=1) for slab in self.slabs()]
        return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(parts), dim=0)


class Slab:
    """v columns of a chunk: log-probabilities and probabilities [n, v] of student and teacher, made when asked for."""

    def __init__(self, chunk: Chunk, columns: slice) -> None:
        self.chunk = chunk
        self.columns = columns

    @cached_property
    def student_logp(self) -> Tensor:
        chunk = self.chunk
        return chunk.tempered(chunk.student_logits[:, self.columns]) - chunk.student_lse[:, None]

    @cached_property
    def teacher_logp(self) -> Tensor:
        chunk = self.chunk
        return chunk.tempered(chunk._teacher[:, self.columns]) - chunk.teacher_lse[:, None]

    @cached_property
    def student_p(self) -> Tensor:
        return self.student_logp.exp()

    @cached_property
    def teacher_p(self) -> Tensor:
        return self.teacher_logp.exp()


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of a weighted sum; `name` is the key under which its own sum is reported."""

    name: str
    loss: Loss
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """`total`: the weighted sum over terms and masked tokens, differentiable. `parts`: each term's unweighted sum."""

    total: Tensor
    parts: dict[str, Tensor]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Everything about a call that autograd does not see."""

    terms: tuple[Term, ...]
    divisor: float
    softcap: float | None
    teacher: Prediction | None
    top_k: TopKPrediction | None
    targets: Tensor | None
    tokens_per_chunk: int
    slab_width: int


def chunked_loss(
    terms: Sequence[Term],
    student: Prediction,
    teacher: Prediction | TopKPrediction | None,
    mask: Tensor,
    targets: Tensor | None = None,
    *,
    tokens_per_chunk: int | None = None,
    vocabulary_per_chunk: int | None = None,
) -> LossSums:
    """The sum of `terms` over the tokens that `mask` [...] (bool) keeps, and each term's own sum.

    student.hidden [..., X] and its head carry the gradient; the teacher never does. Student and teacher must have the same
    leading dimensions and the same vocabulary; hidden sizes may differ. `targets` [...]: ids of the tokens that follow.
    Works under autocast in its dtype; losses and elementwise work are in float32 or better. Raises `ValueError` for shapes
    that do not fit.
    """
    _check(student, teacher, mask)
    keep = mask.flatten().nonzero().squeeze(1)
    hidden = student.hidden.flatten(0, -2).index_select(0, keep)
    vocabulary = student.head.weight.shape[0]
    kind = hidden.device.type
    tokens = max(1, _CHUNK_NUMBERS.get(kind, _CHUNK_NUMBERS_GPU) // vocabulary)
    taller = 1
    if torch.is_grad_enabled() and student.head.weight.requires_grad:
        taller = min(_TALLEST_WITH_TRAINED_HEAD, -(-hidden.shape[1] // (_TALL_ENOUGH * tokens)))
    work = _Work(
        terms=tuple(terms),
        divisor=student.head.divisor,
        softcap=student.head.softcap,
        teacher=_kept(teacher, keep) if isinstance(teacher, Prediction) else None,
        top_k=_kept_top_k(teacher, keep) if isinstance(teacher, TopKPrediction) else None,
        targets=None if targets is None else targets.flatten().index_select(0, keep),
        tokens_per_chunk=tokens_per_chunk or tokens * taller,
        slab_width=vocabulary_per_chunk or _SLAB_WIDTH.get(kind, _SLAB_WIDTH_GPU) // taller,
    )
    weight, bias = student.head.weight, student.head.bias
    if torch.is_autocast_enabled(kind):  # as autocast does with a linear layer, once for all chunks
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    total, *parts = _ChunkedLoss.apply(hidden, weight, bias, work)  # type: ignore[no-untyped-call]
    names = [term.name for term in work.terms]
    return LossSums(total=total, parts=dict(zip(names, parts, strict=True)), num_tokens=keep.numel())


class _ChunkedLoss(torch.autograd.Function):
    """Sums and, where it is wanted, the gradient, in one pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        needed = tuple(ctx.needs_input_grad[:3])
        run = _Pass(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), work, needed)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], work.tokens_per_chunk):
                run.add(slice(start, min(start + work.tokens_per_chunk, hidden.shape[0])))
        ctx.gradients = run.gradients()
        ctx.mark_non_differentiable(*run.sums)
        return run.total(), *run.sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_parts: Tensor) -> Any:
        return (*(None if part is None else part * grad.to(part.dtype) for part in ctx.gradients), None)


class _Pass:
    """Accumulates loss sums and gradients chunk by chunk."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, needed: tuple[bool, ...]
    ) -> None:
        self._work = work
        self._hidden, self._weight = hidden, weight
        self._head = OutputHead(weight=weight, bias=bias, divisor=work.divisor, softcap=work.softcap)
        self._dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.sums = [torch.zeros((), dtype=self._dtype, device=hidden.device) for _ in work.terms]
        self._wanted = any(needed)
        # float32 or better: half-precision sums over many chunks would lose what the plain formula keeps
        self._d_hidden = torch.zeros_like(hidden, dtype=self._dtype) if needed[0] else None
        self._d_weight = torch.zeros_like(weight, dtype=self._dtype) if needed[1] else None
        self._d_bias = torch.zeros_like(bias, dtype=self._dtype) if bias is not None and needed[2] else None

    def total(self) -> Tensor:
        weighted = [sums * term.weight for sums, term in zip(self.sums, self._work.terms, strict=True)]
        return torch.stack(weighted).sum()

    def gradients(self) -> tuple[Tensor | None, ...]:
        """With respect to hidden states, weight and bias, in their dtypes."""
        parts = (self._d_hidden, self._d_weight, self._d_bias)
        return tuple(None if part is None else part.to(self._hidden.dtype) for part in parts)

    def add(self, part: slice) -> None:
        """Count the tokens of one chunk."""
        student_logits, chunks = self._head.logits(self._hidden[part]), {}
        teacher_logits = self._teacher_logits(part)
        losses = []
        for index, term in enumerate(self._work.terms):
            temperature = term.loss.temperature
            if temperature not in chunks:
                chunks[temperature] = self._chunk(student_logits, teacher_logits, part, temperature)
            losses.append(term.loss.losses(chunks[temperature]))
            self.sums[index] += losses[-1].sum()
        if self._wanted:
            self._add_gradient(part, chunks, losses)

    def _add_gradient(self, part: slice, chunks: dict[float, Chunk], losses: list[Tensor]) -> None:
        chunk = next(iter(chunks.values()))
        for slabs in zip(*(one.slabs() for one in chunks.values()), strict=True):
            by_temperature = dict(zip(chunks, slabs, strict=True))
            gradient: Tensor | None = None
            for term, loss in zip(self._work.terms, losses, strict=True):
                slab = by_temperature[term.loss.temperature]
                factor = term.weight / term.loss.temperature  # of tempered logits -> of logits
                own = term.loss.gradient(slab, loss) * factor
                gradient = own if gradient is None else gradient + own
            assert gradient is not None
            columns = slabs[0].columns
            if self._work.softcap is not None or self._work.divisor != 1.0:
                gradient = gradient * self._head.slope(chunk.student_logits[:, columns].to(self._dtype))
            self._project(part, columns, gradient)

    def _project(self, part: slice, columns: slice, gradient: Tensor) -> None:
        """Through the head, in its dtype as the plain formula does."""
        if self._d_bias is not None:
            self._d_bias[columns] += gradient.sum(dim=0)
        gradient = gradient.to(self._weight.dtype)
        same = self._weight.dtype == self._dtype
        for into, left, right in (
            (None if self._d_hidden is None else self._d_hidden[part], gradient, self._weight[columns]),
            (None if self._d_weight is None else self._d_weight[columns], gradient.T, self._hidden[part]),
        ):
            if into is None:
                continue
            if same:
                into.addmm_(left, right)
            else:
                into.add_(left @ right)

    def _teacher_logits(self, part: slice) -> Tensor | None:
        teacher = self._work.teacher
        return None if teacher is None else teacher.head.logits(teacher.hidden[part])

    def _chunk(self, student_logits: Tensor, teacher_logits: Tensor | None, part: slice, temperature: float) -> Chunk:
        work = self._work
        kept, targets = work.top_k, work.targets
        top_k = None
        if kept is not None:
            top_k = TopKPrediction(ids=kept.ids[part], log_probabilities=kept.log_probabilities[part])
        return Chunk(
            student_logits,
            teacher_logits,
            top_k,
            None if targets is None else targets[part],
            temperature,
            work.slab_width,
        )


def _kept(teacher: Prediction, keep: Tensor) -> Prediction:
    """The teacher's rows that count, its head in the dtype of its hidden states."""
    hidden = teacher.hidden.detach().flatten(0, -2).index_select(0, keep)
    head = teacher.head.cast(hidden.dtype)
    return Prediction(hidden=hidden, head=replace(head, weight=head.weight.detach()))


def _kept_top_k(teacher: TopKPrediction, keep: Tensor) -> TopKPrediction:
    return TopKPrediction(
        ids=teacher.ids.flatten(0, -2).index_select(0, keep),
        log_probabilities=teacher.log_probabilities.detach().flatten(0, -2).index_select(0, keep),
    )


def _check(student: Prediction, teacher: Prediction | TopKPrediction | None, mask: Tensor) -> None:
    places = student.hidden.shape[:-1]
    if mask.shape != places or mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool {list(places)}, found {mask.dtype} {list(mask.shape)}")
    if teacher is None:
        return
    other = teacher.ids if isinstance(teacher, TopKPrediction) else teacher.hidden
    if other.shape[:-1] != places:
        raise ValueError(f"teacher: expected predictions for {list(places)}, found {list(other.shape[:-1])}")
    if isinstance(teacher, Prediction) and teacher.head.weight.shape[0] != student.head.weight.shape[0]:
        raise ValueError(
            f"teacher: expected a vocabulary of {student.head.weight.shape[0]}, found {teacher.head.weight.shape[0]}"
        )
