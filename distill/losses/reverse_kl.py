"""KL(student ‖ teacher): the student must stay where the teacher is (MiniLLM, arXiv 2306.08543, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass

from .loss import LOSSES, Chunk, Slab, TemperedLoss, Tensor


@LOSSES.add
@dataclass(frozen=True, kw_only=True)
class ReverseKL(TemperedLoss):
    """τ² · Σ p_student (ln p_student − ln p_teacher), both softmaxes at temperature τ, in nats."""

    name = "reverse-kl"
    order = 1
    figure = "reverse KL"

    def losses(self, chunk: Chunk) -> Tensor:
        divergence = chunk.sum_over_vocabulary(lambda slab: slab.student_p * (slab.student_logp - slab.teacher_logp))
        return divergence * self.temperature**2

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        squared = self.temperature**2
        return slab.student_p * ((slab.student_logp - slab.teacher_logp) * squared - losses[:, None])
