"""Cross entropy with the tokens of the data: plain language modelling, for a mix or as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from .loss import LOSSES, Chunk, Loss, Slab, Tensor


@LOSSES.add
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """−ln p_student of the token that follows, at temperature 1, in nats."""

    name = "cross-entropy"
    order = 3
    figure = "CE"
    needs_teacher = False

    def losses(self, chunk: Chunk) -> Tensor:
        return -chunk.student_log_probabilities_of(chunk.targets[:, None]).squeeze(1)

    def gradient(self, slab: Slab, losses: Tensor) -> Tensor:
        gradient = slab.student_p.clone()
        columns = slab.chunk.targets - slab.columns.start
        rows = ((columns >= 0) & (columns < gradient.shape[1])).nonzero().squeeze(1)
        gradient[rows, columns[rows]] -= 1.0
        return gradient
