"""FSDP2 of a whole model: every decoder layer a unit of its own, then the rest."""

from __future__ import annotations

from typing import Any

import torch


def layer_classes(model: Any) -> list[str]:
    """Names of the decoder layer classes, by which accelerate finds the units to shard."""
    return sorted({type(layer).__name__ for layer in model.get_decoder().layers})


def shard(model: Any, device: torch.device, *, dtype: torch.dtype | None = None, root: Any | None = None) -> None:
    """Shard `model` in place over all processes with torch's fully_shard: each layer, then the model (or its part `root`).

    `model` may lie on the CPU: its parts move to `device` one by one, so that no device ever holds all of it. `dtype`:
    compute in it; parameters keep their own. Parameters are DTensors afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # True for the root as well: what it holds (embedding, head) is large, and must be sharded between two calls
    fully_shard(model if root is None else root, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
