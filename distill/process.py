"""The process of a run: its device, and which of how many it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from xeco_convert.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ProcessContext:
    """Device, and the process among how many."""

    device: torch.device
    world: int
    rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shards(self, sharding: str) -> bool:
        """Whether models are sharded over the processes. On CPUs accelerate knows no FSDP2, and copies are trained."""
        return self.world > 1 and sharding == "fsdp2" and self.device.type == "cuda"

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()


def open_process(device: str | None) -> ProcessContext:
    """The context of this process; joins the others where torchrun started it. `device`: cpu or cuda; None: cuda where there
    is one. Raises `OptionError` without a GPU that was asked for."""
    on_cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise OptionError("--device: cuda is not available here; use --device cpu.")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessContext(device=torch.device("cuda" if on_cuda else "cpu"), world=1, rank=0)
    from datetime import timedelta

    from accelerate import PartialState

    state = PartialState(cpu=not on_cuda, timeout=timedelta(hours=24))
    return ProcessContext(device=state.device, world=state.num_processes, rank=state.process_index)
