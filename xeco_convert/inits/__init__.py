"""Initialisations: how the factors of every layer are made. Each goes through the layers and gives them one by one."""

from __future__ import annotations

import torch

from xeco_convert.inits.base import ConvertedLayer, Initialisation, Progress
from xeco_convert.inits.calibrated import CalibratedInitialisation
from xeco_convert.inits.paper import PaperInitialisation
from xeco_convert.plan import ConversionPlan

__all__ = ["ConvertedLayer", "Initialisation", "Progress", "initialisation_for"]


def initialisation_for(plan: ConversionPlan, device: torch.device, on_progress: Progress) -> Initialisation:
    """The initialisation that the plan's options name."""
    kind = PaperInitialisation if plan.options.init == "paper" else CalibratedInitialisation
    return kind(plan, device, on_progress)
