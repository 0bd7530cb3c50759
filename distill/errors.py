"""What can go wrong in healing, beside the errors of xeco_convert.errors; one sentence each."""

from __future__ import annotations

from xeco_convert.errors import XecoError


class HealingError(XecoError):
    """A healing run that cannot go on; what it reached is kept, and the sentence says where."""


class TeacherError(XecoError):
    """A teacher that is missing, unreachable, or of another vocabulary than the student."""


class DataError(XecoError):
    """Training text that is missing or holds nothing to learn from."""


class InterruptedRunError(HealingError):
    """The user stopped the run; it was saved, and the same command continues it."""
