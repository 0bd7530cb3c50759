"""Latents of a smaller rank, without converting again: what is exported is measured on text that the model writes itself."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.errors import OptionError
from xeco_convert.evaluate import measure_fidelity
from xeco_convert.export.latent_norm import LatentStep, attentions, with_latent_norms
from xeco_convert.export.own_text import OwnText
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.factorize.smaller_rank import LatentMoments, with_smaller_rank
from xeco_convert.modeling import LatentSelfAttention

_BATCH_WINDOWS = 4


def entries_at_rank(entries: Any, rank: int) -> Any:
    """Entries of mla_layers with latents of at most `rank`. Raises `OptionError` where that is more than any layer has; what is
    no entry is left to those who read them."""
    whole = [isinstance(entry, dict) and type(entry.get("kv_lora_rank")) is int for entry in entries or ()]
    ranks = [entry["kv_lora_rank"] for entry, usable in zip(entries or (), whole, strict=True) if usable]
    if ranks and rank > max(ranks):
        raise OptionError(
            f"--rank: expected at most {max(ranks)} (the largest kv_lora_rank of the converted model), found {rank}; choose a "
            "smaller one, or convert again with a larger."
        )
    return [
        {**entry, "kv_lora_rank": min(entry["kv_lora_rank"], rank)} if usable else entry
        for entry, usable in zip(entries or (), whole, strict=True)
    ]


def with_rank(model: Any, rank: int | None, text: OwnText) -> LatentStep:
    """The converted model (float32) with latents of at most `rank`, if that is given, and a norm on each of them."""
    wider = [number for number, module in enumerate(attentions(model)) if module.kv_lora_rank > (rank or math.inf)]
    if rank is None or not wider:
        return with_latent_norms(model, text)
    smaller = with_latent_norms(_at_rank(model, wider, rank, text), text).model
    return LatentStep(model=smaller, rank=measure_fidelity(model, smaller, text.windows.ids))


@torch.no_grad()
def _at_rank(model: Any, wider: list[int], rank: int, text: OwnText) -> Any:
    """A copy of the model with these layers at a smaller rank, and without norms there."""
    moments = _moments(model, wider, text)
    smaller = copy.deepcopy(model)
    for number in wider:
        module = attentions(smaller)[number]
        layer = smaller.config.layer(number)
        mla = MlaAttention.from_module(module, layer.in_model(smaller.config), f"layer {number}")
        _replace_factors(module, with_smaller_rank(mla, moments[number], rank, module.scaling))
        entry = dataclasses.replace(layer, kv_lora_rank=rank, latent_norm=False)
        smaller.config.mla_layers[number] = entry.to_dict()
    return smaller


def _replace_factors(module: LatentSelfAttention, mla: MlaAttention) -> None:
    module.kv_lora_rank = mla.kv_b_weight.shape[1]
    module.kv_a_layernorm = None
    for name, weight in (("kv_a_proj_with_mqa", mla.kv_a_weight), ("kv_b_proj", mla.kv_b_weight)):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.copy_(weight)
        setattr(module, name, linear)


def _moments(model: Any, layers: list[int], text: OwnText) -> dict[int, LatentMoments]:
    """Of the tokens that count, for each of these layers."""
    modules = attentions(model)
    sums = {number: _Sums(modules[number]) for number in layers}
    current: list[Tensor] = []
    handles = [handle for entry in sums.values() for handle in entry.listen(current)]
    ids, counts = text.windows.ids, text.windows.counts
    try:
        for window, counted in zip(ids.split(_BATCH_WINDOWS), counts.split(_BATCH_WINDOWS), strict=True):
            current[:] = [counted]
            model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {number: entry.moments() for number, entry in sums.items()}


class _Sums:
    """Running sums over the tokens of one layer, float64."""

    def __init__(self, module: LatentSelfAttention) -> None:
        rank, heads, nope = module.kv_lora_rank, module.num_heads, module.qk_nope_head_dim
        self._module = module
        self._latents, self._latent = torch.zeros(rank, rank).double(), torch.zeros(rank).double()
        self._queries = torch.zeros(heads, nope, nope).double()
        self._factors, self._tokens = 0.0, 0

    def listen(self, counted: list[Tensor]) -> list[Any]:
        """Hooks on the layer; `counted` holds which tokens of the present batch count."""
        module = self._module
        queries = module.q_proj if module.q_lora_rank is None else module.q_b_proj

        def add_latents(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._add_latents(output[..., : module.kv_lora_rank][counted[0]])

        def add_queries(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows = output[counted[0]].double().unflatten(1, (module.num_heads, -1))[..., : module.qk_nope_head_dim]
            self._queries += torch.einsum("thn,thm->hnm", rows, rows)

        return [
            module.kv_a_proj_with_mqa.register_forward_hook(add_latents),
            queries.register_forward_hook(add_queries),
        ]

    def _add_latents(self, latents: Tensor) -> None:
        norm = self._module.kv_a_layernorm
        if norm is not None:
            self._factors += float((latents.square().mean(dim=1) + (norm.eps or 0.0)).rsqrt().double().sum())
            latents = norm(latents)
        rows = latents.double()
        self._latents += rows.T @ rows
        self._latent += rows.sum(dim=0)
        self._tokens += rows.shape[0]

    def moments(self) -> LatentMoments:
        return LatentMoments(
            latents=self._latents / self._tokens,
            mean=self._latent / self._tokens,
            queries=self._queries / self._tokens,
            norm_factor=1.0 if self._module.kv_a_layernorm is None else self._factors / self._tokens,
        )
