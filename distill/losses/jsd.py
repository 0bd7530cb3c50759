"""Generalised Jensen-Shannon divergence between student and teacher (GKD, arXiv 2306.13649, equation 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.chunked import Chunk, Slab, Term, chunked_loss
from ..losses.prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class JSD:
    """τ² · [β KL(p_teacher ‖ m) + (1 − β) KL(p_student ‖ m)] with m = β p_teacher + (1 − β) p_student, 0 < β < 1, in nats.

    Divided by β it tends to the forward KL for β → 0, divided by 1 − β to the reverse KL for β → 1.
    """

    beta: float = 0.5
    temperature: float = 1.0

    def losses(self, chunk: Chunk) -> Tensor:
        parts = []
        for slab in chunk.slabs():
            middle = self._middle(slab)
            teacher = slab.teacher_p * (slab.teacher_logp - middle)
            student = slab.student_p * (slab.student_logp - middle)
            parts.append((self.beta * teacher + (1 - self.beta) * student).sum(dim=1))
        return torch.stack(parts).sum(dim=0) * self.temperature**2

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        # through the softmax: p_student · (a − Σ p_student a), with a = (1 − β)(ln p_student − ln m)
        pull = (1 - self.beta) * (slab.student_logp - self._middle(slab)) * self.temperature**2
        return slab.student_p * (pull - self._mean_pull(slab)[:, None])

    def _middle(self, slab: Slab) -> Tensor:
        """ln m, from logarithms: probabilities may be too small for their dtype."""
        return torch.logaddexp(slab.teacher_logp + math.log(self.beta), slab.student_logp + math.log1p(-self.beta))

    def _mean_pull(self, slab: Slab) -> Tensor:
        """Σ p_student a over the whole vocabulary, kept on the chunk for its other slabs."""
        kept: dict[JSD, Tensor] = slab.chunk.__dict__.setdefault("_jsd_mean_pull", {})
        if self not in kept:
            parts = [(one.student_p * (one.student_logp - self._middle(one))).sum(dim=1) for one in slab.chunk.slabs()]
            kept[self] = (1 - self.beta) * torch.stack(parts).sum(dim=0) * self.temperature**2
        return kept[self]


def jsd(
    student: Prediction, teacher: Prediction, mask: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Sum of the divergence over the tokens that `mask` keeps; see `chunked_loss` for shapes."""
    term = Term(name="jsd", loss=JSD(beta=beta, temperature=temperature))
    return chunked_loss([term], student, teacher, mask).total
