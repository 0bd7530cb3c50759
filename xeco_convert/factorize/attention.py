"""One attention layer before and after: the tensors that every initialisation takes and gives.

Letters: H query heads, G key/value groups, d head_dim, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim,
R kv_lora_rank, Q q_lora_rank, hidden = hidden_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.factorize.shapes import MlaShape


@dataclass(frozen=True, kw_only=True)
class SourceAttention:
    """Weights of a pretrained layer, rotary rows half-split as Hugging Face stores them (pair i is rows i and i + d/2).

    q_weight [H·d, hidden], k_weight and v_weight [G·d, hidden], o_weight [hidden, H·d]; biases [rows] or None; any one
    floating dtype and device. `input_norm_weight` [hidden]: the RMSNorm weight before the layer.
    """

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    o_weight: Tensor
    input_norm_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True, kw_only=True)
class MlaAttention:
    """Weights of a converted layer, as the model loads them.

    q_weight [H·(N+P), hidden], or q_a_weight [Q, hidden] and q_b_weight [H·(N+P), Q]: each head's un-rotated rows, then
    its rotary rows. kv_a_weight [R+P, hidden]: latent, then shared rotary key. kv_b_weight [H·(N+V), R]: each head's key
    rows, then its value rows. o_weight [hidden, H·V]. Rotary rows are half-split (pair j is rows j and j + P/2).
    """

    kv_a_weight: Tensor
    kv_b_weight: Tensor
    o_weight: Tensor
    q_weight: Tensor | None = None
    q_a_weight: Tensor | None = None
    q_b_weight: Tensor | None = None
    q_bias: Tensor | None = None
    kv_a_bias: Tensor | None = None
    kv_b_bias: Tensor | None = None
    o_bias: Tensor | None = None
    latent_norm_weight: Tensor | None = None
    rope_index: tuple[int, ...] | None = None

    @property
    def qk_rope_head_dim(self) -> int:
        """Width P of the shared rotary key: the rows of kv_a that are not latent."""
        return self.kv_a_weight.shape[0] - self.kv_b_weight.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under their names below the attention module, those that are there."""
        named = {
            **{"q_proj.weight": self.q_weight, "q_a_proj.weight": self.q_a_weight, "q_b_proj.weight": self.q_b_weight},
            **{"kv_a_proj_with_mqa.weight": self.kv_a_weight, "kv_a_proj_with_mqa.bias": self.kv_a_bias},
            **{"kv_a_layernorm.weight": self.latent_norm_weight},
            **{"kv_b_proj.weight": self.kv_b_weight, "kv_b_proj.bias": self.kv_b_bias},
            **{"o_proj.weight": self.o_weight, "o_proj.bias": self.o_bias},
            **{("q_proj.bias" if self.q_weight is not None else "q_b_proj.bias"): self.q_bias},
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> MlaAttention:
        """The same weights in another floating dtype."""
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> MlaAttention:
        """The same layer with some of its tensors replaced, by field."""
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]

    def shape(self, num_attention_heads: int, v_head_dim: int, qk_rope_head_dim: int) -> MlaShape:
        """The widths that these tensors have, given those that their sizes alone do not tell."""
        query = self.q_weight if self.q_weight is not None else self.q_b_weight
        assert query is not None
        named = {"q": self.q_bias, "kv_a": self.kv_a_bias, "kv_b": self.kv_b_bias, "o": self.o_bias}
        return MlaShape(
            num_attention_heads=num_attention_heads,
            hidden_size=self.o_weight.shape[0],
            kv_lora_rank=self.kv_b_weight.shape[1],
            qk_nope_head_dim=query.shape[0] // num_attention_heads - qk_rope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            q_lora_rank=None if self.q_a_weight is None else self.q_a_weight.shape[0],
            latent_norm=self.latent_norm_weight is not None,
            rope_index=self.rope_index,
            biases=tuple(name for name, bias in named.items() if bias is not None),
        )


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Relative errors ‖converted − source‖ / ‖source‖ of a layer's keys and values.

    `paper`: Frobenius norms of the weights. `calibrated`: root mean squares over the calibration tokens, in output units.
    """

    key: float
    value: float


def exact_shape(source: SourceAttention) -> MlaShape:
    """Shape at which MLA holds the source's attention exactly: every rotary row of every group, full-rank values."""
    pairs = source.head_dim // 2
    return MlaShape(
        num_attention_heads=source.num_attention_heads,
        hidden_size=source.q_weight.shape[1],
        kv_lora_rank=source.num_key_value_heads * source.head_dim,
        qk_nope_head_dim=source.head_dim,
        qk_rope_head_dim=source.num_key_value_heads * source.head_dim,
        v_head_dim=source.head_dim,
        rope_index=tuple(range(pairs)) * source.num_key_value_heads,
        biases=_exact_biases(source),
    )


def _exact_biases(source: SourceAttention) -> tuple[str, ...]:
    present = {"q": source.q_bias, "kv_a": source.k_bias, "kv_b": source.v_bias, "o": source.o_bias}
    return tuple(name for name, bias in present.items() if bias is not None)


def exact_factors(source: SourceAttention) -> MlaAttention:
    """The source itself written as MLA, at `exact_shape`: the check that layout, scaling and biases are understood.

    The shared rotary key holds the keys of all groups side by side, each head reads its own group's part; the latent is
    the values. Same dtype as the source, no arithmetic on the weights: any difference of outputs is rounding.
    """
    groups, dim = source.num_key_value_heads, source.head_dim
    k_rope = _all_groups_half_split(source.k_weight, groups)
    k_bias = None if source.k_bias is None else _all_groups_half_split(source.k_bias[:, None], groups)[:, 0]
    q_bias = None if source.q_bias is None else _exact_queries(source.q_bias[:, None], source)[:, 0]
    value_rows = torch.eye(groups * dim, dtype=source.v_weight.dtype, device=source.v_weight.device)
    values_HVR = value_rows.view(groups, dim, -1).repeat_interleave(source.heads_per_group, dim=0)
    kv_b_HNVR = torch.cat([torch.zeros_like(values_HVR), values_HVR], dim=1)
    kv_b_bias = None
    if source.v_bias is not None:
        bias_HV = source.v_bias.view(groups, dim).repeat_interleave(source.heads_per_group, dim=0)
        kv_b_bias = torch.cat([torch.zeros_like(bias_HV), bias_HV], dim=1).reshape(-1)
    latent_bias = None if k_bias is None else torch.cat([torch.zeros_like(k_bias), k_bias])
    return MlaAttention(
        q_weight=_exact_queries(source.q_weight, source),
        kv_a_weight=torch.cat([source.v_weight, k_rope]),
        kv_b_weight=kv_b_HNVR.reshape(-1, groups * dim),
        o_weight=source.o_weight,
        q_bias=q_bias,
        kv_a_bias=latent_bias,
        kv_b_bias=kv_b_bias,
        o_bias=source.o_bias,
        rope_index=exact_shape(source).rope_index,
    )


def _all_groups_half_split(rows: Tensor, groups: int) -> Tensor:
    """Rows [G·d, X] of half-split heads as one half-split head of width G·d: first halves of all groups, then second."""
    return rows.view(groups, 2, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)


def _exact_queries(rows: Tensor, source: SourceAttention) -> Tensor:
    """Query rows [H·d, X] -> [H·(d + G·d), X]: the un-rotated part, then the head's rows in its own group's slots."""
    heads, groups, dim = source.num_attention_heads, source.num_key_value_heads, source.head_dim
    q_HdX = rows.view(heads, dim, -1)
    rotary = rows.new_zeros(heads, 2, groups, dim // 2, rows.shape[-1])
    for head in range(heads):
        rotary[head, :, head // source.heads_per_group] = q_HdX[head].view(2, dim // 2, -1)
    return torch.cat([q_HdX, rotary.reshape(heads, groups * dim, -1)], dim=1).reshape(-1, rows.shape[-1])
