"""Generalised Jensen-Shannon divergence between student and teacher (GKD, arXiv 2306.13649, equation 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xeco_convert.settings import option, require

from .loss import LOSSES, Chunk, Slab, TemperedLoss, Tensor


@LOSSES.add
@dataclass(frozen=True, kw_only=True)
class JSD(TemperedLoss):
    """τ² · [β KL(p_teacher ‖ m) + (1 − β) KL(p_student ‖ m)] with m = β p_teacher + (1 − β) p_student, 0 < β < 1, in nats.

    Divided by β it tends to the forward KL for β → 0, divided by 1 − β to the reverse KL for β → 1.
    """

    name = "jsd"
    order = 2
    figure = "JSD"

    jsd_beta: float = option("jsd: weight of the teacher in the mixture, between 0 and 1.", 0.5, metavar="B")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.jsd_beta < 1, "--jsd-beta", "a number between 0 and 1", self.jsd_beta)

    def losses(self, chunk: Chunk) -> Tensor:
        return chunk.sum_over_vocabulary(self._of_slab) * self.temperature**2

    def _of_slab(self, slab: Slab) -> Tensor:
        middle = self._middle(slab)
        teacher = slab.teacher_p * (slab.teacher_logp - middle)
        student = slab.student_p * (slab.student_logp - middle)
        return self.jsd_beta * teacher + (1 - self.jsd_beta) * student

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        # through the softmax: p_student · (a − Σ p_student a), with a = (1 − β)(ln p_student − ln m)
        pull = (1 - self.jsd_beta) * (slab.student_logp - self._middle(slab)) * self.temperature**2
        return slab.student_p * (pull - self._mean_pull(slab)[:, None])

    def _middle(self, slab: Slab) -> Tensor:
        """ln m, from logarithms: probabilities may be too small for their dtype."""
        import torch

        return torch.logaddexp(
            slab.teacher_logp + math.log(self.jsd_beta), slab.student_logp + math.log1p(-self.jsd_beta)
        )

    def _mean_pull(self, slab: Slab) -> Tensor:
        """Σ p_student a over the whole vocabulary, kept on the chunk for its other slabs."""
        pulls: dict[JSD, Tensor] = slab.chunk.__dict__.setdefault("_jsd_mean_pull", {})
        if self not in pulls:
            pull = slab.chunk.sum_over_vocabulary(lambda one: one.student_p * (one.student_logp - self._middle(one)))
            pulls[self] = (1 - self.jsd_beta) * pull * self.temperature**2
        return pulls[self]
