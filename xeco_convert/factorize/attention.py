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

from xeco_convert.errors import CheckpointError
from xeco_convert.modeling.layer_xeco import FIELDS, MlaShape


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
    κ = (normalised keys, values) of all groups.
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
        return cls(**fields, rope_index=shape.rope_index)  # type: ignore[arg-type]

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


def exact_shape(source: SourceAttention) -> MlaShape:
    """Shape at which MLA holds the source's attention exactly: every rotary row of every group as shared rotary key, the
    other key rows and the values as latent."""
    groups, pairs = source.num_key_value_heads, source.rotated
    return MlaShape(
        num_attention_heads=source.num_attention_heads,
        hidden_size=source.q_weight.shape[1],
        kv_lora_rank=groups * (2 * source.head_dim - 2 * pairs),
        qk_nope_head_dim=source.head_dim,
        qk_rope_head_dim=groups * 2 * pairs,
        v_head_dim=source.head_dim,
        rope_index=tuple(range(pairs)) * groups,
        biases=_exact_biases(source),
        q_norm=source.q_norm,
        k_norm=source.k_norm,
        logit_softcap=source.logit_softcap,
        num_key_value_heads=0 if source.k_norm is None else groups,
    )


def _exact_biases(source: SourceAttention) -> tuple[str, ...]:
    keys, values = ("kv_a", "kv_b") if source.k_norm is None else ("k", "v")
    present = {"q": source.q_bias, keys: source.k_bias, values: source.v_bias, "o": source.o_bias}
    return tuple(name for name, bias in present.items() if bias is not None)


def exact_factors(source: SourceAttention) -> MlaAttention:
    """The source itself written as MLA, at `exact_shape`: the check that layout, scaling and biases are understood.

    The shared rotary key holds the rotary rows of all groups side by side, each head reads its own group's part; the latent
    is the values, then the keys' rows that are not rotated. Same dtype as the source, no arithmetic on the weights: any
    difference of outputs is rounding. Normalised keys stay the source's own, and the latent and rotary key read them.
    """
    if source.k_norm_weight is not None:
        return _exact_behind_norm(source)
    static, k_rope = _split_keys(source.k_weight, source)
    k_bias = None
    if source.k_bias is not None:
        parts = [part[:, 0] for part in _split_keys(source.k_bias[:, None], source)]
        k_bias = torch.cat([parts[0].new_zeros(source.v_weight.shape[0]), *parts])
    kv_b_HUR = torch.cat(_exact_up_projections(source), dim=1)
    queries, head_map, q_bias = source.q_weight, None, source.q_bias
    if source.q_norm_weight is None:
        queries = _exact_queries(queries, source)
        q_bias = None if q_bias is None else _exact_queries(q_bias[:, None], source)[:, 0]
    else:
        identity = torch.eye(source.head_dim, dtype=queries.dtype, device=queries.device)
        head_map = _exact_queries(identity.repeat(source.num_attention_heads, 1), source)
    return MlaAttention(
        q_weight=queries,
        kv_a_weight=torch.cat([source.v_weight, static, k_rope]),
        kv_b_weight=kv_b_HUR.flatten(0, 1),
        o_weight=source.o_weight,
        q_bias=q_bias,
        kv_a_bias=k_bias,
        kv_b_bias=_exact_value_bias(source),
        o_bias=source.o_bias,
        q_norm_weight=source.q_norm_weight,
        q_head_weight=head_map,
        rope_index=exact_shape(source).rope_index,
    )


def _exact_behind_norm(source: SourceAttention) -> MlaAttention:
    """`exact_factors` of a layer that normalises its keys: those of the identity on κ = (keys, values), behind the source's own
    projections and norm."""
    width = source.k_weight.shape[0]
    eye = torch.eye(2 * width, dtype=source.k_weight.dtype, device=source.k_weight.device)
    on_kappa = dataclasses.replace(
        source, k_weight=eye[:width], v_weight=eye[width:], k_bias=None, v_bias=None, k_norm_weight=None
    )
    own = {"k_weight": source.k_weight, "k_norm_weight": source.k_norm_weight, "v_weight": source.v_weight}
    return dataclasses.replace(exact_factors(on_kappa), **own, k_bias=source.k_bias, v_bias=source.v_bias)  # type: ignore[arg-type]


def _split_keys(rows: Tensor, source: SourceAttention) -> tuple[Tensor, Tensor]:
    """Key rows [G·d, X] as rows that are not rotated [G·(d - 2r), X], group by group, and rotary rows [G·2r, X] as one
    half-split head: first halves of all groups, then second."""
    split = rows.view(source.num_key_value_heads, 2, -1, rows.shape[-1])
    static = split[:, :, source.rotated :].reshape(-1, rows.shape[-1])
    return static, split[:, :, : source.rotated].transpose(0, 1).reshape(-1, rows.shape[-1])


def _exact_up_projections(source: SourceAttention) -> tuple[Tensor, Tensor]:
    """W_UK and W_UV [H, d, R]: identities that read each head's group from the latent of `exact_factors`."""
    groups, dim, half, pairs = source.num_key_value_heads, source.head_dim, source.head_dim // 2, source.rotated
    like = source.v_weight
    rank = exact_shape(source).kv_lora_rank
    eye = torch.eye(rank, dtype=like.dtype, device=like.device)
    values = eye[: groups * dim].view(groups, dim, rank)
    keys = like.new_zeros(groups, 2, half, rank)
    keys[:, :, pairs:] = eye[groups * dim :].view(groups, 2, half - pairs, rank)
    repeats = source.heads_per_group
    return keys.flatten(1, 2).repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)


def _exact_value_bias(source: SourceAttention) -> Tensor | None:
    """Bias [H·2d] of the up-projections: zeros for the keys, each head's own for the values."""
    if source.v_bias is None:
        return None
    bias_HV = source.v_bias.view(source.num_key_value_heads, -1).repeat_interleave(source.heads_per_group, dim=0)
    return torch.cat([torch.zeros_like(bias_HV), bias_HV], dim=1).reshape(-1)


def _exact_queries(rows: Tensor, source: SourceAttention) -> Tensor:
    """Query rows [H·d, X] -> [H·(d + G·2r), X]: the un-rotated part, then the head's rotary rows in its own group's slots."""
    heads, groups, dim, pairs = source.num_attention_heads, source.num_key_value_heads, source.head_dim, source.rotated
    q_HdX = rows.view(heads, dim, -1)
    rotary = rows.new_zeros(heads, 2, groups, pairs, rows.shape[-1])
    for head in range(heads):
        rotary[head, :, head // source.heads_per_group] = q_HdX[head].unflatten(0, (2, dim // 2))[:, :pairs]
    return torch.cat([q_HdX, rotary.flatten(1, 3)], dim=1).flatten(0, 1)
