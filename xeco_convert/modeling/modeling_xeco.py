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
import transformers
from torch import Tensor, nn
from torch.nn import functional

from .configuration_xeco import MlaLayer, family_config_class

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
        self.rope_index = layer.rope_index
        self._build_projections(config, layer)
        self._build_rotation(config, rotary_class)

    def _build_projections(self, config: Any, layer: MlaLayer) -> None:
        hidden, heads = config.hidden_size, self.num_heads
        query_width = heads * (layer.qk_nope_head_dim + layer.qk_rope_head_dim)
        self.q_lora_rank = layer.q_lora_rank
        if layer.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias="q" in layer.biases)
        else:
            self.q_a_proj = nn.Linear(hidden, layer.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(layer.q_lora_rank, query_width, bias="q" in layer.biases)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, layer.cache_width, bias="kv_a" in layer.biases)
        eps = config.rms_norm_eps
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
                self._column_table = torch.tensor(self.rope_index * 2, device=device)
        return self._column_table

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, Q, hidden] -> ([B, Q, hidden], attention weights [B, H, Q, T] or None).

        attention_mask: [B, 1, Q, T], boolean or additive; or None, as transformers calls it: one query sees every cached
        token, several are the first ones and see each other causally. Weights are given by the eager implementation alone.
        """
        cos, sin = self._rotation(hidden_states, position_embeddings, position_ids)
        q_nope, q_rope = self._queries(hidden_states)
        c_kv, k_rope = self._latents(hidden_states)
        q_rope = _rotate(q_rope, cos.unsqueeze(2), sin.unsqueeze(2))
        k_rope = _rotate(k_rope, cos, sin)
        if past_key_values is not None:
            cached, rotated = past_key_values.update(c_kv.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
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
        q_nope, q_rope = queries.unflatten(-1, (self.num_heads, -1)).split(
            [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1
        )
        return q_nope, q_rope

    def _latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latent [B, Q, R] and shared rotary key [B, Q, P], not yet rotated."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return c_kv if self.kv_a_layernorm is None else self.kv_a_layernorm(c_kv), k_rope

    def _attend(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Heads' outputs [B, Q, H, V], and the weights where the eager implementation is asked for."""
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
            out_BQHR = fused.fused_attention(
                q_latent, q_rope, c_kv, k_rope, softmax_scale=self.scaling, dtype=dtype, ranges=ranges
            )
        else:
            out_BQHR = absorbed_attention(
                q_latent, q_rope, c_kv, k_rope, softmax_scale=self.scaling, attention_mask=mask, dropout=self._dropout
            )
        return self._from_latents(out_BQHR), None

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
        """A wrapped up-projection or an offloaded one has no weight that could be read past it: expand through it."""
        if type(self.kv_b_proj) is not nn.Linear:
            return "kv_b_proj is wrapped (LoRA, quantised), so its weight cannot be absorbed"
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _asked() -> str | None:
    """The implementation that XECO_ATTENTION names: reference, fused or sdpa; None leaves the choice to the counted work."""
    return os.environ.get("XECO_ATTENTION") or None


_warned = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_obstacle(device_type: str, dtype: torch.dtype, asked: str | None) -> str | None:
    """Why no compiled kernel serves; where the whole package is missing, one warning says so."""
    global _warned  # noqa: PLW0603
    if asked not in (None, "fused"):
        return f"XECO_ATTENTION={asked}"
    if fused is not None:
        return fused.kernel_obstacle(device_type, dtype)
    if device_type == "cpu" and not _warned:
        _warned = True
        # transformers' registry: every checkpoint brings a copy of this file, and the warning is for the process
        warnings.warn_explicit(
            "xeco_convert is not installed; attention runs in plain torch: slower, same results (pip install xeco-convert)",
            UserWarning,
            __file__,
            1,
            registry=vars(transformers).setdefault("__warningregistry__", {}),
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
        source = getattr(transformers, f"{prefix}{kind}")
        attributes = {
            "__module__": __name__,
            "__doc__": f"{source.__name__} whose attention was converted to MLA by xeco-convert.",
            "__init__": _initialiser(source),
            "config_class": family_config_class(prefix),
        }
        globals()[name] = type(name, (XecoModelMixin, source), attributes)
    return globals()[name]


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
            source = decoder_layer.self_attn
            attention_class = _attention_class(type(source))
            decoder_layer.self_attn = attention_class(config, source, layer, type(model.rotary_emb))


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
