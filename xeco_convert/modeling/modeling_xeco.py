"""The model that converted checkpoints load with: the source's own class, its attention replaced by latent attention.

This file is also written beside the weights of converted checkpoints; it needs torch and transformers alone, and uses the
operations of xeco_convert where that package is installed. The classes of a family are made on first use from those of
its source: `XecoLlamaForCausalLM` extends `LlamaForCausalLM`, and so on.

Letters: B batch, Q query tokens, T cached tokens, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim,
R kv_lora_rank.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from .configuration_xeco import MlaLayer, family_config_class, source_class

fused: Any
try:
    from xeco_convert.ops import fused
    from xeco_convert.ops.choice import AttentionCall, choose, explain, fused_obstacle
    from xeco_convert.ops.torch_attention import absorbed_attention, reference_attention, reference_expanded_attention
except ImportError:  # remote code on a machine without the package: the files written beside the weights
    from .xeco_choice import AttentionCall, choose, explain, fused_obstacle  # type: ignore[no-redef,assignment]
    from .xeco_latent_attention import (  # type: ignore[no-redef]
        absorbed_attention,
        reference_attention,
        reference_expanded_attention,
    )

    fused = None


class LatentSelfAttention(nn.Module):
    """Multi-head latent attention in place of a source layer's attention, with the same call and the stock cache.

    Caches the latent [B, 1, T, R] as keys and the rotated shared key [B, 1, T, P] as values, and nothing else. Queries
    attend to the latents themselves, in compiled kernels where these serve, or the latents are expanded to keys and values
    where that is less work: ops/choice.py decides for each call, XECO_ATTENTION=reference|fused|sdpa decides for it, and
    `explain_choice` says why. All give the same result up to rounding.
    """

    def __init__(self, config: Any, source: nn.Module, layer: MlaLayer, rotary_class: type[nn.Module]) -> None:
        nn.Module.__init__(
            self
        )  # not super(): the family's attention class follows, and must not build its projections
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
        self.logit_softcap = layer.logit_softcap
        self.rope_index = layer.rope_index
        self._build_projections(config, layer)
        self._build_rotation(config, rotary_class)

    def _build_projections(self, config: Any, layer: MlaLayer) -> None:
        hidden, heads = config.hidden_size, self.num_heads
        head_width = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_eps
        self.q_norm: nn.Module | None = None
        if layer.q_norm is not None:
            width = layer.qk_nope_head_dim * (heads if layer.q_norm == "all" else 1)
            self.q_norm, self.q_norm_of_all = nn.RMSNorm(width, eps=eps), layer.q_norm == "all"
            self.q_head_proj = nn.Linear(layer.qk_nope_head_dim, heads * head_width, bias=False)
            head_width = layer.qk_nope_head_dim
        query_width = heads * head_width
        self.q_lora_rank = layer.q_lora_rank
        if layer.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias="q" in layer.biases)
        else:
            self.q_a_proj = nn.Linear(hidden, layer.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(layer.q_lora_rank, query_width, bias="q" in layer.biases)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, layer.cache_width, bias="kv_a" in layer.biases)
        self.kv_a_layernorm = nn.RMSNorm(layer.kv_lora_rank, eps=eps) if layer.latent_norm else None
        width = heads * (layer.qk_nope_head_dim + layer.v_head_dim)
        self.kv_b_proj = nn.Linear(layer.kv_lora_rank, width, bias="kv_b" in layer.biases)
        self.o_proj = nn.Linear(heads * layer.v_head_dim, hidden, bias="o" in layer.biases)

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

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, Q, hidden] -> ([B, Q, hidden], attention weights [B, H, Q, T] or None).

        attention_mask: [B, 1, Q, T], boolean or additive; or None, as transformers calls it: one query sees every cached
        token, several are the first ones and see each other causally. Weights are given by the eager implementation alone.
        """
        # by what it is: releases of transformers and families call it past_key_values, cache or layer_past
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        cos, sin = self._rotation(hidden_states, position_embeddings, position_ids)
        q_nope, q_rope = self._queries(hidden_states)
        c_kv, k_rope = self._latents(hidden_states)
        q_rope = _rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))
        k_rope = _rotate(k_rope, cos, sin)
        if cache is not None:
            cached, rotated = cache.update(c_kv.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
            c_kv, k_rope = cached.squeeze(1), rotated.squeeze(1)
        if attention_mask is None and c_kv.shape[1] > hidden_states.shape[1] > 1:
            # transformers leaves the mask out for the prefill of an empty static cache: the slots behind it are still unused
            c_kv, k_rope = c_kv[:, : hidden_states.shape[1]], k_rope[:, : hidden_states.shape[1]]
        out_BQHV, weights = self._attend(q_nope, q_rope, c_kv, k_rope, attention_mask)
        return self.o_proj(out_BQHV.flatten(2)), weights

    def _rotation(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, Q, P] of this layer."""
        if self.rope_index is None:
            if position_ids is None:
                raise ValueError("position_ids are needed by layers with rotary frequencies of their own")
            cos, sin = self.rotary_emb(hidden_states, position_ids)
            return cos, sin
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
        c_kv, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return c_kv if self.kv_a_layernorm is None else self.kv_a_layernorm(c_kv), k_rope

    def _attend(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Heads' outputs [B, Q, H, V], and the weights where the eager implementation is asked for."""
        if self.logit_softcap is not None:
            return self._attend_soft_capped(q_nope, q_rope, c_kv, k_rope, mask)
        dtype = _common_dtype(q_nope, q_rope, c_kv, k_rope)
        needs_gradients = torch.is_grad_enabled() and (q_nope.requires_grad or c_kv.requires_grad)
        sizes = (q_nope.shape[1], c_kv.shape[1], c_kv.device.type, dtype, needs_gradients)
        asked, ranges = _asked(), None
        call = self._call(*sizes, has_mask=mask is not None)
        if mask is not None and fused_obstacle(call) is None:
            ranges, obstacle = _ranges(mask, c_kv.shape[1])
            call = self._call(*sizes, has_mask=True, mask_obstacle=obstacle)
        implementation = choose(call, asked).implementation
        if implementation == "expanded":
            return self._attend_expanded(q_nope, q_rope, c_kv, k_rope, mask), None
        if implementation == "reference":
            out, weights = self._attend_reference(q_nope, q_rope, c_kv, k_rope, mask, call.weight_obstacle is None)
            return out, weights if call.needs_weights else None
        q_latent = self._to_latents(q_nope)
        if implementation == "fused":
            if (
                self.qk_rope_head_dim == 0
            ):  # a layer without rotation: the kernels take at least one pair, here of zeros
                q_rope, k_rope = functional.pad(q_rope, (0, 2)), functional.pad(k_rope, (0, 2))
            out_BQHR = fused.fused_attention(
                q_latent, q_rope, c_kv, k_rope, softmax_scale=self.scaling, dtype=dtype, ranges=ranges
            )
        else:
            out_BQHR = absorbed_attention(
                q_latent, q_rope, c_kv, k_rope, softmax_scale=self.scaling, attention_mask=mask, dropout=self._dropout
            )
        return self._from_latents(out_BQHR), None

    def _attend_soft_capped(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores bounded as cap · tanh(score / cap), which no fused kernel does: written from the formula, float32 softmax.
        The bias of the un-rotated keys counts here, so keys are expanded."""
        keys_values = self.kv_b_proj(c_kv).unflatten(-1, (self.num_heads, -1))
        k_nope, values = keys_values.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        scores = torch.einsum("bqhn,bthn->bhqt", q_nope, k_nope) + torch.einsum("bqhp,btp->bhqt", q_rope, k_rope)
        cap = float(self.logit_softcap or 0.0)
        scores = cap * torch.tanh(scores * self.scaling / cap)
        if mask is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            mask = visible.tril(diagonal=scores.shape[-1] - scores.shape[-2])
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        weights = functional.dropout(weights, p=self._dropout)
        return torch.einsum("bhqt,bthv->bqhv", weights, values), weights

    def explain_choice(self, num_queries: int, num_tokens: int) -> str:
        """Which implementation attention without a mask takes for these numbers of tokens, and why, in words."""
        weight = self.o_proj.weight
        return explain(self._call(num_queries, num_tokens, weight.device.type, weight.dtype, False), _asked())

    def _call(
        self,
        num_queries: int,
        num_tokens: int,
        device_type: str,
        dtype: torch.dtype,
        needs_gradients: bool,
        *,
        has_mask: bool = False,
        mask_obstacle: str | None = None,
    ) -> AttentionCall:
        return AttentionCall(
            num_queries=num_queries,
            num_tokens=num_tokens,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            # in training always: reentrant checkpointing runs the first pass without gradients, and both must agree
            needs_gradients=needs_gradients or self.training,
            needs_weights=self.config._attn_implementation == "eager",
            dropout=self._dropout,
            has_mask=has_mask,
            mask_obstacle=mask_obstacle,
            kernel_obstacle=_kernel_obstacle(device_type, dtype, _asked()),
            weight_obstacle=self._weight_obstacle(),
        )

    def _weight_obstacle(self) -> str | None:
        """A wrapped, quantised or offloaded up-projection has no weight that could be read past it: expand through it."""
        foreign = _foreign_weight(self.kv_b_proj)
        if foreign is not None:
            return f"kv_b_proj {foreign}, so its weight cannot be absorbed"
        return "the weight of kv_b_proj is offloaded" if self.kv_b_proj.weight.is_meta else None

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _to_latents(self, q_nope: Tensor) -> Tensor:
        """Un-rotated queries [B, Q, H, N] to queries of latents [B, Q, H, R].

        The bias of the un-rotated keys is left out: it adds the same to every score of a query, which softmax ignores.
        """
        w_uk = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))[:, : self.qk_nope_head_dim]
        return torch.einsum("bqhn,hnr->bqhr", q_nope, w_uk)

    def _from_latents(self, out_BQHR: Tensor) -> Tensor:
        """What heads read from the latents to their outputs [B, Q, H, V]."""
        w_uv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))[:, self.qk_nope_head_dim :]
        values = torch.einsum("bqhr,hvr->bqhv", out_BQHR, w_uv)
        if self.kv_b_proj.bias is not None:
            values = values + self.kv_b_proj.bias.unflatten(0, (self.num_heads, -1))[:, self.qk_nope_head_dim :]
        return values

    def _attend_reference(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None, absorbed: bool
    ) -> tuple[Tensor, Tensor]:
        if not absorbed:
            return reference_expanded_attention(
                *self._expanded(q_nope, q_rope, c_kv, k_rope),
                softmax_scale=self.scaling,
                attention_mask=mask,
                dropout=self._dropout,
            )
        out, weights = reference_attention(
            self._to_latents(q_nope),
            q_rope,
            c_kv,
            k_rope,
            softmax_scale=self.scaling,
            attention_mask=mask,
            dropout=self._dropout,
        )
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


def _foreign_weight(linear: nn.Module) -> str | None:
    """Why the weight of a projection does not stand for it, in words; None where it does."""
    if type(linear) is not nn.Linear:
        return "is wrapped (LoRA, quantised)"
    if type(linear.weight) in (nn.Parameter, Tensor):
        return None
    return f"has a weight of its own type ({type(linear.weight).__name__}: quantised, sharded)"  # torchao's, for one


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _asked() -> str | None:
    """The implementation that XECO_ATTENTION names: reference, fused or sdpa; None leaves the choice to the counted work."""
    return os.environ.get("XECO_ATTENTION") or None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_obstacle(device_type: str, dtype: torch.dtype, asked: str | None) -> str | None:
    """Why no compiled kernel serves; where the whole package is missing, one warning says so."""
    if asked not in (None, "fused"):
        return f"XECO_ATTENTION={asked}"
    if fused is not None:
        obstacle: str | None = (fused.kernel_obstacle if asked else fused.unasked_obstacle)(device_type, dtype)
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


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that attention is computed in: autocast's, or what holds the numbers of all inputs."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of half-split pairs (RoFormer, arXiv 2104.09864): x [..., P], cos and sin broadcastable to it."""
    if x.shape[-1] == 0:  # a layer without rotation
        return x
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class XecoModelMixin:
    """What every converted model adds to its source's class."""

    _supports_flash_attn = False  # attention over latents is this project's own, not one of transformers' kernels
    _supports_flex_attn = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Eager and SDPA may be switched at run time; transformers looks for a pattern in the source that is not ours."""
        return True


def family_model_class(prefix: str, kind: str) -> Any:
    """The model class of a converted family: `family_model_class("Llama", "ForCausalLM")` is `XecoLlamaForCausalLM`."""
    name = f"Xeco{prefix}{kind}"
    if name not in globals():
        source = source_class(prefix, kind)
        register_weight_conversion(source, name, family_config_class(prefix).model_type)
        attributes = {
            "__module__": __name__,
            "__doc__": f"{source.__name__} whose attention was converted to MLA by xeco-convert.",
            "__init__": _initialiser(source),
            "config_class": family_config_class(prefix),
        }
        globals()[name] = type(name, (XecoModelMixin, source), attributes)
    return globals()[name]


def register_weight_conversion(source: Any, name: str, model_type: str) -> None:
    """Checkpoints of a converted family store weights as those of its source do (experts one by one, for one): transformers
    looks up the conversion of names by class or by model_type."""
    from transformers import conversion_mapping as conversions

    for found, own in ((source.__name__, name), (source.config_class.model_type, model_type)):
        mapping = conversions.get_checkpoint_conversion_mapping(found)
        if mapping is not None and conversions.get_checkpoint_conversion_mapping(own) is None:
            conversions.register_checkpoint_conversion_mapping(own, mapping)


def _initialiser(source: Any) -> Any:
    def initialise(self: Any, config: Any) -> None:
        source.__init__(self, config)
        replace_attention(self.base_model, config)
        self.post_init()

    return initialise


def replace_attention(model: Any, config: Any) -> None:
    """Put latent attention in the converted layers of a decoder that its source's class has just built."""
    for layer_idx, decoder_layer in enumerate(model.layers):
        layer = config.layer(layer_idx)
        if layer is not None:
            name = "self_attn" if hasattr(decoder_layer, "self_attn") else "attention"  # GPT-NeoX
            source = getattr(decoder_layer, name)
            attention_class = _attention_class(type(source))
            setattr(decoder_layer, name, attention_class(config, source, layer, type(model.rotary_emb)))


_attention_classes: dict[type[nn.Module], type[LatentSelfAttention]] = {}


def _attention_class(source_class: type[nn.Module]) -> type[LatentSelfAttention]:
    """Latent attention that is also an instance of the source's attention class, by which transformers finds the
    attention modules of a model (output_attentions, for one)."""
    if source_class not in _attention_classes:
        name = f"Xeco{source_class.__name__}"
        _attention_classes[source_class] = type(name, (LatentSelfAttention, source_class), {"__module__": __name__})
    return _attention_classes[source_class]


def __getattr__(name: str) -> Any:
    """`modeling_xeco.XecoLlamaForCausalLM` and its kin, made on first use."""
    for kind in ("ForCausalLM", "Model"):
        if name.startswith("Xeco") and name.endswith(kind):
            return family_model_class(name.removeprefix("Xeco").removesuffix(kind), kind)
    raise AttributeError(f"module {__name__} has no attribute {name}")
