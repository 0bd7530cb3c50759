"""What the calibrated factorisation needs to know of a layer's activations, accumulated window by window in float64.

The statistics are those of queries, keys and values rather than of the layer's input: second moments of what the layer
computes are all that the closed form uses, they are small whatever hidden_size is, and biases are in them already.

Letters as in attention.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xeco_convert.factorize.attention import AttentionContext, source_probabilities, source_projections
from xeco_convert.factorize.layer_weights import SourceAttention

# Inputs vary less than this share of the strongest direction where the calibration did not see any.
_UNSEEN = 1e-10
# In place of what was not seen: inputs of this share of the mean variance, in all directions.
_RIDGE = 1e-6
# What an accumulator adds up.
_SUMS = ("attended", "values", "queries", "distances", "overlap", "inputs", "weight", "num_tokens")


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Second moments of one layer, float64.

    `attended` [2Gd, 2Gd]: E[κ κᵀ] of κ = (keys, values) of all groups before rotation, each token weighted by the attention
    that it receives. `values` [Gd, Gd]: E[v vᵀ], tokens weighted alike. `queries` [H, d, d]: E[q qᵀ] of each head.
    `rotation` [H, d/2] complex: mean of e^{-jθ(t-s)} (times the rotary type's scaling) over the pairs (t, s) that the head
    looks at, weighted by how much; `rotation_scale` [d/2]: that scaling, squared. `overlap` [H, H]: cosine of the heads'
    attention weights, 1 where two heads look at the same tokens. `inputs` [X, X]: E[x xᵀ], only where queries are
    factorised too. `unseen`: of the `directions` that keys and values have, how many the calibration tokens do not reach
    (`regularised`).
    """

    attended: Tensor
    values: Tensor
    queries: Tensor
    rotation: Tensor
    rotation_scale: Tensor
    overlap: Tensor
    num_tokens: int
    inputs: Tensor | None = None
    directions: int = 0
    unseen: int = 0

    def to(self, device: torch.device | str) -> LayerStatistics:
        """The same on another device."""
        moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in vars(self).items()}
        return LayerStatistics(**moved)

    def regularised(self, source: SourceAttention) -> LayerStatistics:
        """The statistics with `directions` and `unseen`; where some are unseen, with a ridge in their place.

        Keys and values are linear in the inputs, so their second moments W Σ_x Wᵀ (bias included) have the rank of W unless
        the tokens leave directions of the inputs out. Those would come in no order and with no weight: the ridge adds inputs
        of a millionth of the mean variance in all directions, as if Σ_x had it on its diagonal. Normalised keys take part as
        the linear ones behind their norm at its mean scale, each norm by itself.
        """
        gram = _key_value_gram(source)
        gains, vectors = torch.linalg.eigh(gram)
        there = gains > _UNSEEN * gains[-1].clamp_min(1e-300)
        white = vectors[:, there] / gains[there].sqrt()
        seen = torch.linalg.eigvalsh(white.T @ self.attended @ white)
        directions = int(there.sum())
        unseen = int((seen <= _UNSEEN * seen[-1]).sum()) if directions else 0
        if unseen == 0:
            return dataclasses.replace(self, directions=directions)
        ridge = _RIDGE * float(seen.mean())
        queries_HdX = _with_bias(source.q_weight, source.q_bias).unflatten(0, (source.num_attention_heads, -1))
        inputs = self.inputs
        if inputs is not None:
            inputs = inputs + ridge * torch.eye(inputs.shape[0], dtype=inputs.dtype, device=inputs.device)
        return dataclasses.replace(
            self,
            attended=self.attended + ridge * gram,
            values=self.values + ridge * gram[-self.values.shape[0] :, -self.values.shape[0] :],
            queries=self.queries + ridge * queries_HdX @ queries_HdX.transpose(1, 2),
            inputs=inputs,
            directions=directions,
            unseen=unseen,
        )


def _key_value_gram(source: SourceAttention) -> Tensor:
    """W Wᵀ [2Gd, 2Gd] of the map from (x, 1) to κ, float64."""
    keys, values = _with_bias(source.k_weight, source.k_bias), _with_bias(source.v_weight, source.v_bias)
    if source.k_norm_weight is None:
        joint = torch.cat([keys, values])
        return joint @ joint.T
    # tokens scale the keys behind each norm differently, so that they vary apart from each other and from the values
    width = source.k_norm_weight.numel()
    behind = keys.unflatten(0, (-1, width))
    scale = (
        source.k_norm_weight.double() / behind.square().sum(dim=2).mean(dim=1, keepdim=True).clamp_min(1e-300).sqrt()
    )
    behind = behind * scale[..., None]
    gram: Tensor = torch.block_diag(*(behind @ behind.transpose(1, 2)), values @ values.T)
    return gram


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The map from (x, 1), float64."""
    return weight.double() if bias is None else torch.cat([weight, bias[:, None]], dim=1).double()


def _by_distance(weights_HTT: Tensor) -> Tensor:
    """Sums [H, T] of causal attention weights over the pairs (t, s) of each distance t - s, float64."""
    heads, length, _ = weights_HTT.shape
    padded = functional.pad(weights_HTT, (length, 0))  # row t has s in its column T + s
    # rows pushed on by t: column j has s = t + j - T, at a distance of T - j
    pushed = padded.as_strided((heads, length, length), (2 * length * length, 2 * length + 1, 1))
    nearest = weights_HTT.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
    return torch.cat([nearest, pushed.sum(dim=1)[:, 1:].flip(1)], dim=1).double()


class StatisticsAccumulator:
    """Adds up the statistics of one layer over windows [w, T, X] of its (normed) input."""

    def __init__(self, source: SourceAttention, context: AttentionContext, *, with_inputs: bool = False) -> None:
        self._source = source
        self._context = context
        device = source.q_weight.device
        heads, width = source.num_attention_heads, source.num_key_value_heads * source.head_dim
        length = context.mask.shape[-1]
        self._attended = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=device)
        self._values = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._queries = torch.zeros(heads, source.head_dim, source.head_dim, dtype=torch.float64, device=device)
        self._distances = torch.zeros(heads, length, dtype=torch.float64, device=device)
        self._overlap = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self._inputs = (
            torch.zeros((source.q_weight.shape[1],) * 2, dtype=torch.float64, device=device) if with_inputs else None
        )
        self._weight = 0.0
        self._num_tokens = 0

    def sums(self) -> dict[str, Any]:
        """What was added up so far, for `restore`."""
        return {name: getattr(self, f"_{name}") for name in _SUMS}

    def restore(self, sums: Mapping[str, Any]) -> None:
        """Go on from the sums of another accumulator for the same layer."""
        for name in _SUMS:
            value = sums[name]
            setattr(self, f"_{name}", value.to(self._attended.device) if isinstance(value, Tensor) else value)

    def add(self, x_WTX: Tensor, counts_WT: Tensor) -> None:
        """Windows of inputs in the dtype of the weights, and which of their tokens count, as queries and as values."""
        looks = x_WTX.new_zeros(self._queries.shape[0], *self._context.mask.shape[-2:])
        for x_TX, counts_T in zip(x_WTX, counts_WT.to(x_WTX.device), strict=True):
            queries, keys, values = (part[0] for part in source_projections(self._source, x_TX[None]))
            probabilities = source_probabilities(queries[None], keys[None], self._context)[0]
            probabilities = probabilities * counts_T[:, None]  # only what counted queries look at
            received_T = probabilities.sum(dim=(0, 1)).double()
            flat = probabilities.flatten(1)
            self._overlap += (flat @ flat.T).double()
            joint = torch.cat([keys.flatten(1), values.flatten(1)], dim=1).double()
            self._attended += joint.T @ (joint * received_T[:, None])
            self._weight += float(received_T.sum())
            counted = values[counts_T].flatten(1).double()
            self._values += counted.T @ counted
            q_THd = queries[counts_T].double()
            self._queries += torch.einsum("thd,the->hde", q_THd, q_THd)
            looks += probabilities
            if self._inputs is not None:
                counted_x = x_TX[counts_T].double()
                self._inputs += counted_x.T @ counted_x
            self._num_tokens += int(counts_T.sum())
        self._distances += _by_distance(looks)

    def result(self) -> LayerStatistics:
        """The statistics of what was added. Raises `ValueError` where nothing was."""
        if self._num_tokens == 0:
            raise ValueError("statistics need at least one token that counts")
        half = self._source.head_dim // 2
        cos, sin = self._context.cos[0, :, :half].double(), self._context.sin[0, :, :half].double()
        # both rotated sides carry the rotary type's scaling: at position 0 the table shows it (1 for pairs not rotated)
        scale = cos[0]
        turns = torch.complex(cos, -sin) * scale
        shares = self._distances / self._distances.sum(dim=1, keepdim=True)
        norms = self._overlap.diagonal().sqrt()
        return LayerStatistics(
            overlap=self._overlap / (norms[:, None] * norms[None]),
            attended=self._attended / self._weight,
            values=self._values / self._num_tokens,
            queries=self._queries / self._num_tokens,
            rotation=shares.to(turns.dtype) @ turns,
            rotation_scale=scale * scale,
            num_tokens=self._num_tokens,
            inputs=None if self._inputs is None else self._inputs / self._num_tokens,
        )
