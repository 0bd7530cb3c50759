"""KL(teacher ‖ student) from the teacher's K most likely tokens alone, kept from an earlier pass.

The other tokens count as one: the loss is the KL between distributions over K + 1 outcomes. It is never above the whole
forward KL, equals it at K = V − 1 (and K = V), and is 0 only where the K probabilities agree. Renormalising the K tokens
instead, as is often done, would pull the student towards giving the others no chance at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import Chunk, Slab
from .loss import Loss


@dataclass(frozen=True, kw_only=True)
class ForwardKLTopK(Loss):
    """Σ_K p_teacher (ln p_teacher − ln p_student) + r_teacher (ln r_teacher − ln r_student), in nats, at temperature 1;
    r is what is left of a distribution beside the K tokens."""

    name = "forward-kl"
    figure = "KL"

    def losses(self, chunk: Chunk) -> Tensor:
        teacher_logp, student_logp = self._pair(chunk)
        teacher_p = teacher_logp.exp()
        rest = teacher_rest(teacher_logp)
        among = (teacher_p * (teacher_logp - student_logp)).sum(dim=1)
        left = rest * (rest.clamp_min(_tiny(rest)).log() - self._student_rest(chunk).log())
        return among + torch.where(rest > 0, left, 0.0)

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        """p_student − p_teacher on the K tokens; p_student · (1 − r_teacher / r_student) elsewhere."""
        chunk = slab.chunk
        teacher_logp, student_logp = self._pair(chunk)
        ratio = teacher_rest(teacher_logp) / self._student_rest(chunk)
        gradient = slab.student_p * (1.0 - ratio)[:, None]
        assert chunk.top_k is not None
        columns = chunk.top_k.ids - slab.columns.start
        inside = (columns >= 0) & (columns < gradient.shape[1])
        rows = inside.nonzero()[:, 0]
        gradient[rows, columns[inside]] = (student_logp.exp() - teacher_logp.exp())[inside]
        return gradient

    def _pair(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, K] of teacher and student."""
        if chunk.top_k is None:
            raise ValueError("this loss needs the teacher's top-k log-probabilities")
        return chunk.top_k.log_probabilities.to(chunk.dtype), chunk.student_log_probabilities_of(chunk.top_k.ids)

    def _student_rest(self, chunk: Chunk) -> Tensor:
        rest = 1.0 - chunk.student_log_probabilities_of(chunk.top_k.ids).exp().sum(dim=1)  # type: ignore[union-attr]
        return rest.clamp_min(_tiny(rest))


def teacher_rest(log_probabilities: Tensor) -> Tensor:
    """What the kept tokens leave to all others [n]; rounding may take it below zero."""
    return (1.0 - log_probabilities.exp().sum(dim=1)).clamp_min(0.0)


def _tiny(like: Tensor) -> float:
    """Rounding of 1 − Σ p: a smaller rest is none."""
    return float(torch.finfo(like.dtype).eps)
