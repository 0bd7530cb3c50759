"""Latent attention as a module that stands in for the attention of a source layer.

This file is also written beside the weights of converted checkpoints; it needs torch and transformers alone, and uses the
operations of xeco_convert where that package is installed.

Letters: B batch, Q query tokens, T cached tokens, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim,
R kv_lora_rank.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache, StaticCache

from .arguments_xeco import cache_among
from .configuration_xeco import norm_eps
from .layer_xeco import Bits, MlaLayer, MlaShape

fused: Any
try:
    from xeco_convert.ops import fused, pack_rows
    from xeco_convert.ops.choice import AttentionCall, choose, explain, fused_obstacle
    from xeco_convert.ops.packed_rows import as_cached, unpack_rows
    from xeco_convert.ops.torch_attention import (
        absorbed_attention,
        common_dtype,
        reference_attention,
        reference_expanded_attention,
        rotate,
    )
except ImportError:  # remote code on a machine without the package: the files written beside the weights
    from .xeco_choice import AttentionCall, choose, explain, fused_obstacle  # type: ignore[no-redef,assignment]
    from .xeco_latent_attention import (  # type: ignore[no-redef]
        absorbed_attention,
        common_dtype,
        reference_attention,
        reference_expanded_attention,
        rotate,
    )
    from .xeco_packed_rows import as_cached, pack_rows, unpack_rows  # type: ignore[no-redef]

    fused = None


class LatentSelfAttention(nn.Module):
    """Multi-head latent attention in place of a source layer's attention, with the same call and the stock cache.

    Caches the latent [B, 1, T, R] as keys and the rotated shared key [B, 1, T, P] as values, and nothing else; where the layer
    says so in codes of few bits with a scale for each token, [B, 1, T, bytes] of uint8 (ops/packed_rows.py). Queries
    attend to the latents themselves, in compiled kernels where these serve, or the latents are expanded to keys and values
    where that is less work: ops/choice.py decides for each call, XECO_ATTENTION=reference|fused|sdpa decides for it, and
    `explain_choice` says why. All give the same result up to rounding.
    """

    # made by `_build_projections`, those that the layer has
    q_proj: nn.Linear
    q_a_proj: nn.Linear
    q_b_proj: nn.Linear
    q_head_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    kv_a_proj_with_mqa: nn.Linear
    kv_b_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, config: Any, source: nn.Module, layer: MlaLayer, rotary_class: type[nn.Module]) -> None:
        # not super(): the family's attention class follows, and must not build its projections
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx: int = source.layer_idx  # type: ignore[assignment]
        self.scaling: float = source.scaling  # type: ignore[assignment]
        self.attention_dropout: float = source.attention_dropout  # type: ignore[assignment]
        self.is_causal = True
        self.num_heads: int = config.num_attention_heads
        self.kv_lora_rank = layer.kv_lora_rank
        self.qk_nope_head_dim = layer.qk_nope_head_dim
        self.qk_rope_head_dim = layer.qk_rope_head_dim
        self.v_head_dim = layer.v_head_dim
        self.q_lora_rank = layer.q_lora_rank
        self.q_norm_of_all = layer.q_norm == "all"
        self.logit_softcap = layer.logit_softcap
        self.latent_bits, self.rope_bits, self.is_packed = layer.latent_bits, layer.rope_bits, layer.is_packed
        self.rope_index = layer.rope_index
        # the source's order, which differs between families, for arguments that come without a name
        self._positional = tuple(inspect.signature(type(source).forward).parameters)[2:]
        self._build_projections(layer.in_model(config), norm_eps(config))
        self._build_rotation(config, rotary_class)

    def _build_projections(self, shape: MlaShape, eps: float) -> None:
        """A module for each tensor of the layer's table; None for the norms that it has not."""
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        self.kv_a_layernorm: nn.RMSNorm | None = None
        tensors = shape.tensors()
        for name, size in tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and len(size) == 1:
                setattr(self, module, nn.RMSNorm(*size, eps=eps))
            elif part == "weight":
                setattr(self, module, nn.Linear(size[1], size[0], bias=f"{module}.bias" in tensors))

    def _build_rotation(self, config: Any, rotary_class: type[nn.Module]) -> None:
        """A rotary module of this layer's own width where it does not use columns of the source's cos and sin tables."""
        self._column_table: Tensor | None = None
        if self.rope_index is None:
            own = copy.deepcopy(config)
            own.head_dim = self.qk_rope_head_dim
            self.rotary_emb = rotary_class(config=own)

    def _rope_columns(self, device: torch.device) -> Tensor:
        """Columns [P] of the source's tables, made on first use: from_pretrained builds modules without memory, and would
        leave a buffer that no file holds unfilled."""
        if self._column_table is None or self._column_table.device != device:
            assert self.rope_index is not None
            with torch.inference_mode(False):  # made during generate, the table must still serve training
                self._column_table = torch.tensor(self.rope_index * 2, dtype=torch.int64, device=device)
        return self._column_table

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, Q, hidden] -> ([B, Q, hidden], attention weights [B, H, Q, T] or None).

        Takes what the source's attention takes, by name or in its order: position_embeddings, two tables [B or 1, Q, width];
        attention_mask [B, 1, Q, T], boolean or additive, or None, as transformers calls it: one query sees every cached token,
        several are the first ones and see each other causally; position_ids [B or 1, Q]; and a cache, under whatever name
        it comes. Weights are given by the eager implementation alone. Raises `ValueError` for what cannot be honoured.
        """
        named.update(zip(self._positional, positional, strict=False))
        cache = cache_among(named, self.layer_idx)
        mask: Tensor | None = named.get("attention_mask")
        cos, sin = self._rotation(hidden_states, named.get("position_embeddings"), named.get("position_ids"))
        q_nope, q_rope = self._queries(hidden_states)
        c_kv, k_rope = self._latents(hidden_states)
        q_rope = rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))
        k_rope = rotate(k_rope, cos, sin)
        c_kv, k_rope = self._cached(cache, c_kv, k_rope)
        if mask is None and c_kv.shape[1] > hidden_states.shape[1] > 1:
            # transformers leaves the mask out for the prefill of an empty static cache: the slots behind it are still unused
            c_kv, k_rope = c_kv[:, : hidden_states.shape[1]], k_rope[:, : hidden_states.shape[1]]
        needs_weights = self._needs_weights(bool(named.get("output_attentions")))
        out_BQHV, weights = self._attend(q_nope, q_rope, c_kv, k_rope, mask, needs_weights)
        return self.o_proj(out_BQHV.flatten(2)), weights

    def _cached(self, cache: Any, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """All latents [B, T, R] and rotated keys [B, T, P] to attend to: the new ones behind those of the cache. What is cached
        in codes comes as codes (uint8), or where there is no cache, or gradients flow, as the codes would give it back."""
        if not self.is_packed:
            return (c_kv, k_rope) if cache is None else self._update(cache, c_kv, k_rope)
        if cache is None:
            return as_cached(c_kv, self.latent_bits), as_cached(k_rope, self.rope_bits)
        _refuse_other_codes(cache, self.layer_idx)
        codes = self._update(cache, _packed(c_kv, self.latent_bits), _packed(k_rope, self.rope_bits))
        if not (torch.is_grad_enabled() and (c_kv.requires_grad or k_rope.requires_grad)):
            return codes
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"layer {self.layer_idx}: gradients do not pass a static cache of codes; take a dynamic one, or use_cache=False"
            )
        # gradients go to the new rows, which stand last in a cache that grows
        latents, keys = self._widened(*codes, c_kv.dtype)
        old = latents.shape[1] - c_kv.shape[1]
        latents = torch.cat([latents[:, :old], as_cached(c_kv, self.latent_bits)], dim=1)
        return latents, torch.cat([keys[:, :old], as_cached(k_rope, self.rope_bits)], dim=1)

    def _widened(self, c_kv: Tensor, k_rope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of the cache as numbers."""
        return _unpacked(c_kv, self.latent_bits, dtype), _unpacked(k_rope, self.rope_bits, dtype)

    def _update(self, cache: Any, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """All cached latents [B, T, R] and rotated keys [B, T, P], the new ones among them."""
        if self.qk_rope_head_dim == 0 and type(cache) not in (DynamicCache, StaticCache):
            # Not every cache holds values of no width (quantised ones do not): the latent as two halves
            halves = (half.unsqueeze(1) for half in c_kv.tensor_split(2, dim=-1))
            latents = torch.cat(cache.update(*halves, self.layer_idx), dim=-1).squeeze(1)
            return latents, latents[..., :0]
        cached, rotated = cache.update(c_kv.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
        return cached.squeeze(1), rotated.squeeze(1)

    def _rotation(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, Q, P] of this layer."""
        if self.rope_index is None:
            if position_ids is None:
                raise ValueError("position_ids are needed by layers with rotary frequencies of their own")
            cos, sin = self.rotary_emb(hidden_states, position_ids)
            return cos, sin
        if position_embeddings is None:
            raise ValueError("position_embeddings are needed by layers with rotary frequencies of the model's tables")
        cos, sin = position_embeddings
        columns = self._rope_columns(cos.device)
        return cos.index_select(-1, columns), sin.index_select(-1, columns)

    def _queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated [B, Q, H, N] and rotary [B, Q, H, P] part of the queries."""
        if self.q_lora_rank is None:
            queries = self.q_proj(hidden_states)
        else:
            queries = self.q_b_proj(self.q_a_proj(hidden_states))
        queries = queries.unflatten(-1, (self.num_heads, -1)) if self.q_norm is None else self._normalised(queries)
        q_nope, q_rope = queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope

    def _normalised(self, queries: Tensor) -> Tensor:
        """The source's own queries [B, Q, H·N] behind its norm, each head mapped to [B, Q, H, N+P]."""
        assert self.q_norm is not None
        if self.q_norm_of_all:
            heads = self.q_norm(queries).unflatten(-1, (self.num_heads, -1))
        else:
            heads = self.q_norm(queries.unflatten(-1, (self.num_heads, -1)))
        if _foreign_weight(self.q_head_proj) is None:
            return torch.einsum("bqhn,hmn->bqhm", heads, self.q_head_proj.weight.unflatten(0, (self.num_heads, -1)))
        # through the module: every head by every head's rows, of which its own are taken
        crossed_BQHHM = self.q_head_proj(heads).unflatten(-1, (self.num_heads, -1))
        return crossed_BQHHM.diagonal(dim1=2, dim2=3).transpose(-1, -2)

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, Q, R] and shared rotary key [B, Q, P], not yet rotated."""
        inputs = hidden_states if self.k_norm is None else self._keys_and_values(hidden_states)
        c_kv, k_rope = self.kv_a_proj_with_mqa(inputs).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return c_kv if self.kv_a_layernorm is None else self.kv_a_layernorm(c_kv), k_rope

    def _keys_and_values(self, hidden_states: Tensor) -> Tensor:
        """What latent and rotary key are linear in where the source normalises its keys [B, Q, 2·G·V]: its normalised keys of
        all groups, not rotated, then its values. Another map that is not linear in the input would go here."""
        assert self.k_norm is not None
        # a norm over all rows is that of one head as wide as they are
        heads = self.k_proj(hidden_states).unflatten(-1, (-1, self.k_norm.weight.numel()))
        return torch.cat([self.k_norm(heads).flatten(-2), self.v_proj(hidden_states)], dim=-1)

    def _attend(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None, needs_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Heads' outputs [B, Q, H, V], and the weights where they are needed."""
        dtype = common_dtype(*(rows for rows in (q_nope, q_rope, c_kv, k_rope) if rows.dtype != torch.uint8))
        needs_gradients = torch.is_grad_enabled() and (q_nope.requires_grad or c_kv.requires_grad)
        sizes = (q_nope.shape[1], c_kv.shape[1], c_kv.device.type, dtype, needs_gradients, needs_weights)
        requested, ranges = _requested(), None
        call = self._call(*sizes, has_mask=mask is not None)
        if mask is not None and fused_obstacle(call) is None:
            ranges, obstacle = _ranges(mask, c_kv.shape[1])
            call = self._call(*sizes, has_mask=True, mask_obstacle=obstacle)
        implementation = choose(call, requested).implementation
        reads_codes = c_kv.dtype == k_rope.dtype == torch.uint8 and self.qk_rope_head_dim > 0
        reads_codes = reads_codes and implementation == "fused" and fused.takes_codes(c_kv.device.type, requested)
        reads_codes = reads_codes and not needs_gradients
        if self.is_packed and not reads_codes:
            c_kv, k_rope = self._widened(c_kv, k_rope, q_nope.dtype)
        if implementation == "reference" or (self.logit_softcap is not None and implementation != "fused"):
            over_latents = implementation != "expanded" and call.weight_obstacle is None
            out, weights = self._attend_reference(q_nope, q_rope, c_kv, k_rope, mask, over_latents)
            return out, weights if needs_weights else None
        if implementation == "expanded":
            return self._attend_expanded(q_nope, q_rope, c_kv, k_rope, mask), None
        q_latent = self._to_latents(q_nope)
        if implementation == "fused":
            if self.qk_rope_head_dim == 0:
                # a layer without rotation: the kernels take at least one pair, here of zeros
                q_rope, k_rope = functional.pad(q_rope, (0, 2)), functional.pad(k_rope, (0, 2))
            out_BQHR = fused.fused_attention(
                q_latent,
                q_rope,
                c_kv,
                k_rope,
                softmax_scale=self.scaling,
                softcap=self.logit_softcap,
                dtype=dtype,
                ranges=ranges,
                bits=(self.latent_bits, self.rope_bits) if reads_codes else None,
            )
        else:
            out_BQHR = absorbed_attention(
                q_latent, q_rope, c_kv, k_rope, softmax_scale=self.scaling, attention_mask=mask, dropout=self._dropout
            )
        return self._from_latents(out_BQHR), None

    def explain_choice(self, num_queries: int, num_tokens: int) -> str:
        """Which implementation attention without a mask takes for these numbers of tokens, and why, in words."""
        weight = self.o_proj.weight
        sizes = (num_queries, num_tokens, weight.device.type, weight.dtype, False, self._needs_weights(False))
        return explain(self._call(*sizes), _requested())

    def _needs_weights(self, requested: bool) -> bool:
        """Whether the weights are returned: by the eager implementation, which soft-capped models get from transformers where
        it has no other for them; there they are for those who ask."""
        requested = requested or self.logit_softcap is None or bool(self.config.output_attentions)
        return requested and self.config._attn_implementation == "eager"

    def _call(
        self,
        num_queries: int,
        num_tokens: int,
        device_type: str,
        dtype: torch.dtype,
        needs_gradients: bool,
        needs_weights: bool,
        *,
        has_mask: bool = False,
        mask_obstacle: str | None = None,
    ) -> AttentionCall:
        return AttentionCall(
            num_queries=num_queries,
            num_tokens=num_tokens,
            device_type=device_type,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            # in training always: reentrant checkpointing runs the first pass without gradients, and both must agree
            needs_gradients=needs_gradients or self.training,
            needs_weights=needs_weights,
            soft_capped=self.logit_softcap is not None,
            dropout=self._dropout,
            has_mask=has_mask,
            mask_obstacle=mask_obstacle,
            kernel_obstacle=_kernel_obstacle(device_type, dtype, _requested()),
            weight_obstacle=self._weight_obstacle(),
        )

    def _weight_obstacle(self) -> str | None:
        """Why latents are expanded through kv_b_proj: wrapped, quantised or offloaded it has no weight that could be read past
        it, and softmax does not ignore the bias of un-rotated keys where scores are capped."""
        foreign = _foreign_weight(self.kv_b_proj)
        if foreign is not None:
            return f"kv_b_proj {foreign}, so its weight cannot be absorbed"
        if self.logit_softcap is not None and self.kv_b_proj.bias is not None:
            return "the bias of kv_b_proj counts under a soft cap, and attention over latents leaves it out"
        return "the weight of kv_b_proj is offloaded" if self.kv_b_proj.weight.is_meta else None

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _to_latents(self, q_nope: Tensor) -> Tensor:
        """Un-rotated queries [B, Q, H, N] to queries of latents [B, Q, H, R].

        The bias of the un-rotated keys is left out: it adds the same to every score of a query, which softmax ignores.
        """
        w_uk = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))[:, : self.qk_nope_head_dim]
        return _by_head(q_nope, w_uk)

    def _from_latents(self, out_BQHR: Tensor) -> Tensor:
        """What heads read from the latents to their outputs [B, Q, H, V]."""
        w_uv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))[:, self.qk_nope_head_dim :]
        values = _by_head(out_BQHR, w_uv.transpose(1, 2))
        if self.kv_b_proj.bias is not None:
            values = values + self.kv_b_proj.bias.unflatten(0, (self.num_heads, -1))[:, self.qk_nope_head_dim :]
        return values

    def _attend_reference(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None, over_latents: bool
    ) -> tuple[Tensor, Tensor]:
        settings: dict[str, Any] = {
            "softmax_scale": self.scaling,
            "attention_mask": mask,
            "dropout": self._dropout,
            "softcap": self.logit_softcap,
        }
        if not over_latents:
            return reference_expanded_attention(*self._expanded(q_nope, q_rope, c_kv, k_rope), **settings)
        out, weights = reference_attention(self._to_latents(q_nope), q_rope, c_kv, k_rope, **settings)
        return self._from_latents(out), weights

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, Q, N + P], keys [B, H, T, N + P] and values [B, H, T, V] of every head."""
        expanded_BHTX = self.kv_b_proj(c_kv).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, values = expanded_BHTX.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, self.num_heads, -1, -1)], dim=-1)
        return torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2), keys, values

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        queries, keys, values = self._expanded(q_nope, q_rope, c_kv, k_rope)
        # Equal widths let torch's fused kernels serve; the padded columns come out as zeros and are dropped.
        values = functional.pad(values, (0, max(0, keys.shape[-1] - self.v_head_dim)))
        out = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self._dropout,
            is_causal=mask is None and queries.shape[2] > 1,
            scale=self.scaling,
        )
        return out[..., : self.v_head_dim].transpose(1, 2)


def _packed(rows: Tensor, bits: Bits) -> Tensor:
    """Rows as the cache holds them."""
    return rows if bits == 16 else pack_rows(rows, bits)


def _unpacked(rows: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """Rows of the cache as attention reads them."""
    return unpack_rows(rows, bits, dtype) if rows.dtype == torch.uint8 else rows


def _refuse_other_codes(cache: Any, layer_idx: int) -> None:
    """Raises `ValueError` for a cache that would quantise the codes once more."""
    layers = getattr(cache, "layers", None) or ()
    own = type(layers[layer_idx]) if layer_idx < len(layers) else None  # a cache may add its layers as they come
    if own is not None and any("Quantized" in base.__name__ for base in own.__mro__):
        raise ValueError(
            f"layer {layer_idx}: this model caches codes of its own (latent_bits and rope_bits in config.json), found a "
            "quantised cache, which would quantise them again; generate without cache_implementation='quantized'"
        )


def _foreign_weight(linear: nn.Module) -> str | None:
    """Why the weight of a projection does not stand for it, in words; None where it does."""
    if type(linear) is not nn.Linear:
        return "is wrapped (LoRA, quantised)"
    if type(linear.weight) in (nn.Parameter, Tensor):
        return None
    return f"has a weight of its own type ({type(linear.weight).__name__}: quantised, sharded)"  # torchao's, for one


def _by_head(rows_BQHM: Tensor, maps_HMN: Tensor) -> Tensor:
    """The rows of each head times its map [B, Q, H, N]. As einsum, which takes the host longer than a GPU takes the product."""
    batch, num_queries = rows_BQHM.shape[:2]
    mapped_HXN = torch.bmm(rows_BQHM.flatten(0, 1).transpose(0, 1), maps_HMN)
    return mapped_HXN.transpose(0, 1).unflatten(0, (batch, num_queries))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _requested() -> str | None:
    """The implementation that XECO_ATTENTION names: reference, fused or sdpa; None leaves the choice to the counted work."""
    return os.environ.get("XECO_ATTENTION") or None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_obstacle(device_type: str, dtype: torch.dtype, requested: str | None) -> str | None:
    """Why no compiled kernel serves; where the whole package is missing, one warning says so."""
    if requested not in (None, "fused"):
        return f"XECO_ATTENTION={requested}"
    if fused is not None:
        obstacle: str | None = (fused.kernel_obstacle if requested else fused.unasked_obstacle)(device_type, dtype)
        return obstacle
    # Marked on torch: every checkpoint brings a copy of this file, and the warning is for the process.
    if device_type == "cpu" and not getattr(torch, "_xeco_convert_warned", False):
        torch._xeco_convert_warned = True  # type: ignore[attr-defined]
        warnings.warn(
            "xeco_convert is not installed; attention runs in plain torch: slower, same results (pip install xeco-convert)",
            stacklevel=2,
        )
    return "xeco_convert is not installed"


def _ranges(mask: Tensor, num_tokens: int) -> tuple[Any, str | None]:
    """The ranges that a mask stands for, and why there are none."""
    if torch.compiler.is_compiling():
        return None, "a mask's numbers cannot be read while torch.compile traces"
    ranges = fused.ranges_of(mask) if mask.shape[-1] == num_tokens else None
    return (
        ranges,
        None if ranges is not None else "the mask is not one range of tokens for each sequence in causal order",
    )
