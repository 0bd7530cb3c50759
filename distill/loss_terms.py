"""The weighted sum of losses that the options ask for."""

from __future__ import annotations

from .losses.chunked import Term
from .losses.cross_entropy import CrossEntropy
from .options import DistillOptions


def terms_of(options: DistillOptions) -> tuple[Term, ...]:
    """The loss of --loss (from the teacher's most likely tokens with --top-k), and cross entropy with the data beside it."""
    objective = options.objective if options.top_k is None else options.objective.of_top_k()
    assert objective is not None, "DistillOptions refuses --top-k for the others"
    mixed = options.ce_weight > 0 and objective.needs_teacher
    first = Term(
        name=_key(objective.name), loss=objective, weight=1 - options.ce_weight if objective.needs_teacher else 1.0
    )
    mix = (Term(name=_key(CrossEntropy.name), loss=CrossEntropy(), weight=options.ce_weight),) if mixed else ()
    return (first, *mix)


def _key(name: str) -> str:
    """Under which its sum is logged."""
    return name.replace("-", "_")
