"""Plans and windows for the tests of the calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import random_ids

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.work import WorkFolder
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import ConversionPlan, make_plan


def plan_for(source: Path, **options: Any) -> ConversionPlan:
    return make_plan(CheckpointIndex.open(source), ConvertOptions(**{"rank": 8, **options}))


def work_folder_for(source: Path, *, work_dir: str | None = None, **options: Any) -> WorkFolder:
    plan = plan_for(source, work_dir=work_dir, **options)
    return WorkFolder(work_dir, plan.source.index, plan.options)


def random_windows(count: int = 3, length: int = 20, *, seed: int = 0) -> CalibrationWindows:
    ids = random_ids(count, length, seed=seed)
    return CalibrationWindows(ids=ids, counts=torch.ones_like(ids, dtype=torch.bool), description="random tokens")
