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
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.modeling import LatentSelfAttention
from xeco_convert.modeling.configuration_xeco import norm_eps

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
    lacking = {number: module for number, module in enumerate(attentions(model)) if module.kv_a_layernorm is None}
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
    latents = _latents(model, list(lacking.values()), windows.ids, windows.counts)
    before = copy.deepcopy(model)
    for (number, module), rows in zip(lacking.items(), latents, strict=True):
        shape = model.config.layer(number).in_model(model.config)
        layer = MlaAttention.from_module(module, shape, f"layer {number}")
        module.kv_a_layernorm = nn.RMSNorm(module.kv_lora_rank, eps=norm_eps(model.config))
        module.load_state_dict(with_steady_basis(layer, steady_basis(rows, seed=seed)).state_dict())
    return NormStep(model=model, fidelity=measure_fidelity(before, model, windows.ids))


def _latents(model: Any, modules: list[LatentSelfAttention], ids: Tensor, counts: Tensor) -> list[Tensor]:
    """Latents [n, R] of the tokens that count, for each module."""
    latents: list[list[Tensor]] = [[] for _ in modules]
    current: list[Tensor] = []

    def hook_of(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            latents[number].append(output[..., : modules[number].kv_lora_rank][current[0]])

        return hook

    handles = [module.kv_a_proj_with_mqa.register_forward_hook(hook_of(i)) for i, module in enumerate(modules)]
    try:
        for window, counted in zip(ids.split(4), counts.split(4), strict=True):
            current[:] = [counted]
            model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in latents]
