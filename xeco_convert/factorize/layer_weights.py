"""One attention layer before and after: the tensors that every initialisation takes and gives.

Letters: H query heads, G key/value groups, d head_dim, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim,
R kv_lora_rank, Q q_lora_rank, hidden = hidden_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xeco_convert.errors import CheckpointError
from xeco_convert.modeling.layer_xeco import FIELDS, Bits, MlaShape


@dataclass(frozen=True, kw_only=True)
class SourceAttention:
    """Weights of a pretrained layer, rotary rows half-split as Hugging Face stores them (pair i is rows i and i + d/2).

    q_weight [H·d, hidden], k_weight and v_weight [G·d, hidden], o_weight [hidden, H·d]; biases [rows] or None; any one
    floating dtype and device. `input_norm_weight` [hidden]: the RMSNorm weight before the layer. `rotary_pairs` r: only the
    pairs i < r of each head are rotated (None: all; the rows of the others are put last in each half). `q_norm_weight` and
    `k_norm_weight` [d] (each head by itself) or [all rows]: RMSNorm of queries and keys after projection, eps `norm_eps`.
    `logit_softcap`: scores become cap · tanh(score / cap).
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
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    logit_softcap: float | None = None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_pairs: int | None = None

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def rotated(self) -> int:
        """Rotary pairs of a head."""
        return self.head_dim // 2 if self.rotary_pairs is None else self.rotary_pairs

    @property
    def q_norm(self) -> str | None:
        """How queries are normalised: "head", "all" rows together, or not at all."""
        return _kind_of_norm(self.q_norm_weight, self.head_dim)

    @property
    def k_norm(self) -> str | None:
        """How keys are normalised: "head", "all" rows together, or not at all."""
        return _kind_of_norm(self.k_norm_weight, self.head_dim)

    def with_linear_keys(self, k_weight: Tensor, k_bias: Tensor | None) -> SourceAttention:
        """The layer with keys k_weight·x + k_bias in place of its normalised ones (docs/conversion.md)."""
        v_bias = self.v_bias
        if k_bias is not None and v_bias is None:  # the joint factor takes both or none
            v_bias = k_bias.new_zeros(self.v_weight.shape[0])
        return dataclasses.replace(self, k_weight=k_weight, k_bias=k_bias, v_bias=v_bias, k_norm_weight=None)


@dataclass(frozen=True, kw_only=True)
class MlaAttention:
    """Weights of a converted layer, as the model loads them.

    q_weight [H·(N+P), hidden], or q_a_weight [Q, hidden] and q_b_weight [H·(N+P), Q]: each head's un-rotated rows, then
    its rotary rows. kv_a_weight [R+P, hidden]: latent, then shared rotary key. kv_b_weight [H·(N+V), R]: each head's key
    rows, then its value rows. o_weight [hidden, H·V]. Rotary rows are half-split (pair j is rows j and j + P/2).
    With a norm of the queries, q_weight (or q_b_weight) has N rows for each head, q_norm_weight is [N] or [H·N], and
    q_head_weight [H·(N+P), N] maps each head's normalised query to its un-rotated and rotary rows. With a norm of the keys,
    k_weight and v_weight [G·V, hidden] and k_norm_weight ([V] or [G·V]) are the source's, and kv_a_weight [R+P, 2·G·V] reads
    κ = (normalised keys, values) of all groups. Where `latent_bits` or `rope_bits` are below 16, latent or rotary key are what
    codes of so many bits give back (ops/packed_rows.py).
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
    q_norm_weight: Tensor | None = None
    q_head_weight: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    v_weight: Tensor | None = None
    v_bias: Tensor | None = None
    rope_index: tuple[int, ...] | None = None
    latent_bits: Bits = 16
    rope_bits: Bits = 16

    @property
    def qk_rope_head_dim(self) -> int:
        """Width P of the shared rotary key: the rows of kv_a that are not latent."""
        return self.kv_a_weight.shape[0] - self.kv_b_weight.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under their names below the attention module, those that are there. Inverse: `from_state_dict`."""
        other_queries = (
            "q_b_proj." if self.q_weight is not None else "q_proj."
        )  # q_bias goes with the queries there are
        named = {name: getattr(self, field) for name, field in FIELDS.items() if not name.startswith(other_queries)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], shape: MlaShape, where: str) -> MlaAttention:
        """The layer of this shape from its tensors by their names below the attention module; `where` names it in errors.

        Raises `CheckpointError` for a name that the shape does not have, one that is missing, and a wrong size: a tensor that
        were left out would change the layer.
        """
        expected = shape.tensors()
        actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if actual != expected:
            wrong = sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))[0]
            have, want = (list(sizes[wrong]) if wrong in sizes else "none" for sizes in (actual, expected))
            raise CheckpointError(
                f"{where}.{wrong}: expected {want} by the layer's widths in config.json, found {have}; config.json does not "
                "belong to these weights."
            )
        fields = {FIELDS[name]: tensor for name, tensor in tensors.items()}
        layer = cls(**fields, rope_index=shape.rope_index)  # type: ignore[arg-type]
        return dataclasses.replace(layer, latent_bits=shape.latent_bits, rope_bits=shape.rope_bits)

    @classmethod
    def from_module(cls, attention: nn.Module, shape: MlaShape, where: str) -> MlaAttention:
        """The weights of a converted layer's module, without gradients; they are the module's own, not copies."""
        state = {name: tensor.detach() for name, tensor in attention.state_dict().items()}
        return cls.from_state_dict(state, shape, where)

    def to(self, dtype: torch.dtype) -> MlaAttention:
        """The same weights in another floating dtype."""
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> MlaAttention:
        """The same layer with some of its tensors replaced, by field."""
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]


def _kind_of_norm(weight: Tensor | None, head_dim: int) -> str | None:
    if weight is None:
        return None
    return "head" if weight.numel() == head_dim else "all"


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Relative errors ‖converted − source‖ / ‖source‖ of a layer's keys and values.

    `paper`: Frobenius norms of the weights. `calibrated`: root mean squares over the calibration tokens, in output units.
    """

    key: float
    value: float
