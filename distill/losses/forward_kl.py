"""KL(teacher ‖ student): the student must cover everything that the teacher thinks possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.chunked import Chunk, Slab, Term, chunked_loss
from ..losses.prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """τ² · Σ p_teacher (ln p_teacher − ln p_student), both softmaxes at temperature τ, in nats.

    τ² keeps the size of the gradient where τ changes (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """

    temperature: float = 1.0

    def losses(self, chunk: Chunk) -> Tensor:
        parts = [(slab.teacher_p * (slab.teacher_logp - slab.student_logp)).sum(dim=1) for slab in chunk.slabs()]
        return torch.stack(parts).sum(dim=0) * self.temperature**2

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        return (slab.student_p - slab.teacher_p) * self.temperature**2


def forward_kl(student: Prediction, teacher: Prediction, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of KL(teacher ‖ student) over the tokens that `mask` keeps; see `chunked_loss` for shapes."""
    term = Term(name="forward_kl", loss=ForwardKL(temperature=temperature))
    return chunked_loss([term], student, teacher, mask).total
