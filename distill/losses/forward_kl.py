"""KL(teacher ‖ student): the student must cover everything that the teacher thinks possible."""

from __future__ import annotations

from dataclasses import dataclass

from .loss import LOSSES, Chunk, Loss, Slab, TemperedLoss, Tensor


@LOSSES.add
@dataclass(frozen=True, kw_only=True)
class ForwardKL(TemperedLoss):
    """τ² · Σ p_teacher (ln p_teacher − ln p_student), both softmaxes at temperature τ, in nats."""

    name = "forward-kl"
    order = 0
    figure = "KL"

    def of_top_k(self) -> Loss | None:
        from .forward_kl_top_k import ForwardKLTopK

        return ForwardKLTopK() if self.temperature == 1.0 else None

    def losses(self, chunk: Chunk) -> Tensor:
        divergence = chunk.sum_over_vocabulary(lambda slab: slab.teacher_p * (slab.teacher_logp - slab.student_logp))
        return divergence * self.temperature**2

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        return (slab.student_p - slab.teacher_p) * self.temperature**2
