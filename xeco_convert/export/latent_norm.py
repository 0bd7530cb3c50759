"""The latent norm that a stock class cannot be without: taken from the checkpoint, or put in place and its price measured.

RMSNorm divides each token's latent by its own rms. In the basis of factorize/latent_norm.py that rms is nearly the same for all
tokens; what the norm still changes is measured as KL of the model's predictions with and without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.calibration.sampling import sample_windows
from xeco_convert.evaluate import Fidelity, measure_fidelity
from xeco_convert.factorize.latent_norm import steady_basis
from xeco_convert.modeling import LatentSelfAttention

_WINDOW_TOKENS = 256
_NUM_WINDOWS = 16


@dataclass(frozen=True, kw_only=True)
class NormStep:
    """Models before and after; `fidelity`: after against before, None where every layer had a norm already."""

    model: Any
    fidelity: Fidelity | None


def attentions(model: Any) -> list[LatentSelfAttention]:
    """The converted attention modules, layer by layer."""
    return [module for module in model.modules() if isinstance(module, LatentSelfAttention)]


@torch.no_grad()
def with_latent_norms(
    model: Any, folder: Path, *, weights_bytes: int, seed: int, on_progress: Callable[[float], None] | None = None
) -> NormStep:
    """The model in `folder` (float32, loaded as `model`) with a norm on every latent.

    Layers without one get it in the steadiest basis, over tokens that the model writes itself. `on_progress` is told the share
    of that text.
    """
    lacking = [module for module in attentions(model) if module.kv_a_layernorm is None]
    if not lacking:
        return NormStep(model=model, fidelity=None)
    longest = getattr(model.config, "max_position_embeddings", _WINDOW_TOKENS)
    windows = sample_windows(
        folder,
        weights_bytes=weights_bytes,
        length=min(_WINDOW_TOKENS, longest),
        num_tokens=_NUM_WINDOWS * _WINDOW_TOKENS,
        seed=seed,
        device=torch.device("cpu"),
        on_progress=on_progress,
    )
    latents = _latents(model, lacking, windows.ids, windows.counts)
    before = copy.deepcopy(model)
    eps = getattr(model.config, "rms_norm_eps", None) or model.config.layer_norm_eps
    for module, rows in zip(lacking, latents, strict=True):
        matrix = steady_basis(rows, seed=seed).matrix
        down, up = module.kv_a_proj_with_mqa.weight, module.kv_b_proj.weight
        down[: module.kv_lora_rank] = (matrix @ down[: module.kv_lora_rank].double()).to(down.dtype)
        up.copy_(torch.linalg.solve(matrix.T, up.double().T).T)
        module.kv_a_layernorm = nn.RMSNorm(module.kv_lora_rank, eps=eps)
    return NormStep(model=model, fidelity=measure_fidelity(before, model, windows.ids))


def _latents(model: Any, modules: list[LatentSelfAttention], ids: Tensor, counts: Tensor) -> list[Tensor]:
    """Latents [n, R] of the tokens that count, for each module."""
    found: list[list[Tensor]] = [[] for _ in modules]
    current: list[Tensor] = []

    def keep(place: int) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[place].append(output[..., : modules[place].kv_lora_rank][current[0]])

        return hook

    handles = [module.kv_a_proj_with_mqa.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    try:
        for window, counted in zip(ids.split(4), counts.split(4), strict=True):
            current[:] = [counted]
            model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in found]
