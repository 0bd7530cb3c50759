"""The latent norm that a stock class cannot be without: taken from the checkpoint, or put in place and its price measured.

RMSNorm divides each token's latent by its own rms. In the basis of factorize/latent_norm.py that rms is nearly the same for all
tokens; what the norm still changes is measured as KL of the model's predictions with and without it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.evaluate import Fidelity, measure_fidelity
from xeco_convert.export.own_text import OwnText
from xeco_convert.factorize.latent_norm import steady_basis, with_steady_basis
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.modeling import LatentSelfAttention
from xeco_convert.modeling.configuration_xeco import norm_eps


@dataclass(frozen=True, kw_only=True)
class LatentStep:
    """The model as it will be exported. `norm` and `rank`: its predictions against those before it got norms on its latents, or
    latents of a smaller rank (norms included); None where nothing changed."""

    model: Any
    norm: Fidelity | None = None
    rank: Fidelity | None = None


def attentions(model: Any) -> list[LatentSelfAttention]:
    """The converted attention modules, layer by layer."""
    return [module for module in model.modules() if isinstance(module, LatentSelfAttention)]


@torch.no_grad()
def with_latent_norms(model: Any, text: OwnText) -> LatentStep:
    """The converted model (float32) with a norm on every latent. Layers without one get it in the steadiest basis."""
    lacking = {number: module for number, module in enumerate(attentions(model)) if module.kv_a_layernorm is None}
    if not lacking:
        return LatentStep(model=model)
    windows = text.windows
    latents = _latents(model, list(lacking.values()), windows.ids, windows.counts)
    before = copy.deepcopy(model)
    for (number, module), rows in zip(lacking.items(), latents, strict=True):
        shape = model.config.layer(number).in_model(model.config)
        layer = MlaAttention.from_module(module, shape, f"layer {number}")
        module.kv_a_layernorm = nn.RMSNorm(module.kv_lora_rank, eps=norm_eps(model.config))
        module.load_state_dict(with_steady_basis(layer, steady_basis(rows, seed=text.seed)).state_dict())
    return LatentStep(model=model, norm=measure_fidelity(before, model, windows.ids))


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
