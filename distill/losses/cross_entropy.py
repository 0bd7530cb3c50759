"""Cross entropy with the tokens of the data: plain language modelling, for a mix or as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .loss import LOSSES, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from .chunked import Chunk, Slab
    from .prediction import Prediction


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


def cross_entropy(student: Prediction, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of the cross entropy over the tokens that `mask` keeps; `targets` [...] int64, ids of the tokens that follow."""
    from .chunked import Term, chunked_loss

    return chunked_loss([Term(name="cross_entropy", loss=CrossEntropy())], student, None, mask, targets).total
