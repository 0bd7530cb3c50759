"""Losses, one file each: (student, teacher, mask) -> summed loss; the trainer divides once."""

from .loss import LOSSES, Loss

__all__ = ["LOSSES", "Loss"]
