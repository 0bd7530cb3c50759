"""The calibrated initialisation in closed form (docs/conversion.md, steps 1 to 4).

Everything is a linear map on what the source layer computes: the latent and the rotary key are rows E·κ of κ = (keys,
values) of all groups, each head's queries are Q_h·q_h. Applied to weights and biases these maps give the converted layer.

Letters: G groups, H heads, d head_dim, F = d/2, R kv_lora_rank, P qk_rope_head_dim, X hidden_size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import LayerErrors, MlaAttention, SourceAttention
from xeco_convert.factorize.rope import real_rows, rotary_components
from xeco_convert.factorize.spread import RowEnergies
from xeco_convert.factorize.statistics import LayerStatistics

# Directions whose weight is this far below the largest are rounding of the calibration, not signal.
_NEGLIGIBLE = 1e-12
_UNREAD = 1e-6  # weight of query directions that no key reads, as a share of the mean
_TINY = 1e-300  # in place of a reference that is zero: a layer that puts out nothing loses nothing


class CalibratedLayer:
    """The closed form of one layer, for any widths. All arithmetic in float64 on the statistics' device.

    `key_weight`: what a squared error of keys counts beside one of values. At 1 as if the score errors of a query's tokens
    were independent; what they have in common, softmax takes off, so that less may be nearer to the truth.
    """

    def __init__(
        self,
        source: SourceAttention,
        statistics: LayerStatistics,
        softmax_scale: float,
        *,
        one_per_frequency: bool = False,
        key_weight: float = 1.0,
    ) -> None:
        self._source = source
        self._statistics = statistics
        self._scale = softmax_scale
        self._key_weight = key_weight
        self._half = source.head_dim // 2
        groups, heads, dim = source.num_key_value_heads, source.num_attention_heads, source.head_dim
        self._w_o = source.o_weight.double().view(-1, heads, dim).permute(1, 0, 2)  # [H, X, d]
        self._head_metric = self._w_o.transpose(1, 2) @ self._w_o  # [H, d, d]: W_oᵀ W_o
        per_group = statistics.values.view(groups, dim, groups, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        spread = per_group.repeat_interleave(source.heads_per_group, dim=0)
        # λ_h: squared output error of a unit squared score error, the spread of the values that the head mixes; weighted
        self._head_weight = key_weight * softmax_scale**2 * (self._head_metric * spread).sum(dim=(1, 2))
        self._components = rotary_components(source, statistics, self._head_weight, one_per_frequency=one_per_frequency)
        self._key_roots = _roots(self._key_metric())  # [G, d, d] each
        self._value_roots = _roots(self._value_metric()[None])  # [1, Gd, Gd] each
        self._latent_cache: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @property
    def key_weight(self) -> float:
        return self._key_weight

    def with_key_weight(self, key_weight: float) -> CalibratedLayer:
        """The same layer with keys weighed differently, which scales what was found already."""
        other, ratio = copy.copy(self), key_weight / self._key_weight
        other._key_weight = key_weight
        other._head_weight = ratio * self._head_weight
        other._components = self._components.weighed(ratio)
        root, inverse = self._key_roots
        other._key_roots = root * ratio**0.5, inverse / ratio**0.5
        other._latent_cache = {}
        return other

    def factors(
        self, kv_lora_rank: int, qk_rope_head_dim: int, *, q_lora_rank: int | None = None, latent_norm: bool = False
    ) -> MlaAttention:
        """The converted layer at these widths, float64; qk_nope_head_dim = v_head_dim = head_dim.

        With `latent_norm` the norm's weight is the latent's rms over the calibration tokens: a norm that changes least.
        """
        source, pairs = self._source, qk_rope_head_dim // 2
        eigenvalues, vectors, up_keys, up_values = self._latent(qk_rope_head_dim)
        rms = eigenvalues[:kv_lora_rank].mean().sqrt()
        encode = vectors.T @ self._weigh(qk_rope_head_dim)
        if latent_norm:  # at rms 1 the norm's eps is far below the latent, as it is meant to be
            encode = encode / rms.clamp_min(_TINY)
        rope_rows = real_rows(self._components.encode[:pairs], self._components.frequency[:pairs], self._half)
        rope_rows = torch.cat([rope_rows, torch.zeros_like(rope_rows)], dim=1)  # reads keys, no values
        maps = torch.cat([encode[:kv_lora_rank], rope_rows])
        repeats = source.heads_per_group
        up = torch.cat([up_keys[..., :kv_lora_rank], up_values[..., :kv_lora_rank]], dim=1)
        q_weight, q_bias, q_head = self._queries(self._query_maps(qk_rope_head_dim))
        q_a, q_b = None, None
        if q_lora_rank is not None:
            metric = self._query_metric(eigenvalues[:kv_lora_rank], up_keys[..., :kv_lora_rank], pairs)
            if q_head is not None:  # what an error in front of the norm and the map costs, were the norm linear
                q_head_HQd = q_head.view(source.num_attention_heads, -1, source.head_dim)
                metric = q_head_HQd.transpose(1, 2) @ metric @ q_head_HQd
            q_a, q_b = self._query_factors(q_weight, metric, q_lora_rank)
        return MlaAttention(
            q_weight=q_weight if q_a is None else None,
            q_a_weight=q_a,
            q_b_weight=q_b,
            kv_a_weight=self._on_inputs(maps),
            kv_b_weight=up.repeat_interleave(repeats, dim=0).reshape(-1, kv_lora_rank),
            o_weight=source.o_weight.double(),
            q_bias=q_bias,
            q_norm_weight=None if source.q_norm_weight is None else source.q_norm_weight.double(),
            q_head_weight=q_head,
            kv_a_bias=self._joint_bias(maps),
            o_bias=None if source.o_bias is None else source.o_bias.double(),
            latent_norm_weight=rms.expand(kv_lora_rank).clone() if latent_norm else None,
            rope_index=tuple(self._components.frequency[:pairs].tolist()),
        ).with_tensors(self._kept_projections())

    def _on_inputs(self, maps: Tensor) -> Tensor:
        """Maps of κ as maps of what the converted layer computes them from: its input, or κ itself behind a norm of the keys."""
        if self._source.k_norm_weight is not None:
            return maps
        return maps @ torch.cat([self._source.k_weight, self._source.v_weight]).double()

    def _kept_projections(self) -> dict[str, Tensor]:
        """The source's projections to κ where it normalises keys, float64; else they are in kv_a."""
        if self._source.k_norm_weight is None:
            return {}
        names = ("k_weight", "k_bias", "k_norm_weight", "v_weight", "v_bias")
        tensors = {name: getattr(self._source, name) for name in names}
        return {name: tensor.double() for name, tensor in tensors.items() if tensor is not None}

    def expected_error(self, kv_lora_rank: int, qk_rope_head_dim: int) -> float:
        """Expected squared output error of these widths, relative to what the heads put out.

        What they lose of the latent's spectrum and of the rotary components, were nothing to cancel over the attended
        tokens: an upper bound in practice. Ask for equal rotary widths in a row: each takes a decomposition.
        """
        rotary = self._components.gain[qk_rope_head_dim // 2 :].sum()
        return float(self.latent_spectrum(qk_rope_head_dim)[kv_lora_rank:].sum() + rotary / self._expected_square())

    def as_share(self, squared_error: float | Tensor) -> float:
        """A squared output error, such as energies add up to, relative to what the heads put out."""
        return float(squared_error / self._expected_square())

    def energies(self, kv_lora_rank: int, qk_rope_head_dim: int) -> RowEnergies:
        """Mean squares of what a layer of these widths caches, in output units: every row counts alike."""
        latent = self._latent(qk_rope_head_dim)[0][:kv_lora_rank]
        return RowEnergies(latent=latent, pairs=self._rotary_power(qk_rope_head_dim // 2))

    def _rotary_power(self, pairs: int) -> Tensor:
        """Mean square of each rotary pair's two rows [pairs]."""
        width = self._source.num_key_value_heads * self._source.head_dim
        rows = real_rows(self._components.encode[:pairs], self._components.frequency[:pairs], self._half)
        power = ((rows @ self._statistics.attended[:width, :width]) * rows).sum(dim=1)
        return power.view(2, pairs).mean(dim=0)

    def latent_spectrum(self, qk_rope_head_dim: int) -> Tensor:
        """Expected squared output error [2·G·d] that each latent row saves once the rotary rows are chosen, descending."""
        return self._latent(qk_rope_head_dim)[0] / self._expected_square()

    def errors(self, kv_lora_rank: int, qk_rope_head_dim: int) -> LayerErrors:
        """Relative errors of keys and values in output units: what the widths lose of each, rotary components included."""
        weigh, vectors = self._weigh(qk_rope_head_dim), self._latent(qk_rope_head_dim)[1]
        width = weigh.shape[0] // 2
        moment = weigh @ self._statistics.attended @ weigh.T
        kept = vectors[:, :kv_lora_rank]
        left = moment - kept @ (kept.T @ moment)
        left = (left - (left @ kept) @ kept.T).diagonal().clamp_min(0)
        rotary = self._components.gain
        key_lost = left[:width].sum() + rotary[qk_rope_head_dim // 2 :].sum()
        key_total = moment.diagonal()[:width].sum() + rotary.sum()
        value_total = moment.diagonal()[width:].sum()
        return LayerErrors(
            key=float((key_lost / key_total.clamp_min(_TINY)).sqrt()),
            value=float((left[width:].sum() / value_total.clamp_min(_TINY)).sqrt()),
        )

    def _expected_square(self) -> float:
        """Upper reference of the output's size: the output if attention mixed nothing, Σ_h tr(W_oᵀW_o E[v vᵀ])."""
        return max(float(self._head_weight.sum()) / (self._key_weight * self._scale**2), _TINY)

    def _queries(self, maps_HOd: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Query weight, bias, and the map of each head behind its norm; without a norm the map is part of the weight."""
        source = self._source
        if source.q_norm_weight is not None:
            bias = None if source.q_bias is None else source.q_bias.double()
            return source.q_weight.double(), bias, maps_HOd.flatten(0, 1)
        bias = None if source.q_bias is None else _apply_heads(maps_HOd, source.q_bias[:, None])[:, 0]
        return _apply_heads(maps_HOd, source.q_weight), bias, None

    def _joint_bias(self, maps: Tensor) -> Tensor | None:
        source = self._source
        if source.k_norm_weight is not None or source.k_bias is None or source.v_bias is None:
            return None  # behind a norm of the keys, the biases are in κ
        return maps @ torch.cat([source.k_bias, source.v_bias]).double()

    def _latent(self, qk_rope_head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(eigenvalues [2Gd], eigenvectors [2Gd, 2Gd] as columns, W_UK and W_UV [G, d, 2Gd]) of the joint factor, best first."""
        if qk_rope_head_dim not in self._latent_cache:
            self._latent_cache = {qk_rope_head_dim: self._joint_factor(qk_rope_head_dim)}
        return self._latent_cache[qk_rope_head_dim]

    def _joint_factor(self, qk_rope_head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        groups, dim = self._source.num_key_value_heads, self._source.head_dim
        weigh = self._weigh(qk_rope_head_dim)
        eigenvalues, vectors = torch.linalg.eigh(weigh @ self._statistics.attended @ weigh.T)
        vectors = vectors.flip(1)
        up_keys = self._key_roots[1] @ vectors[: groups * dim].view(groups, dim, -1)
        up_values = (self._value_roots[1][0] @ vectors[groups * dim :]).view(groups, dim, -1)
        return eigenvalues.flip(0).clamp_min(0), vectors, up_keys, up_values

    def _weigh(self, qk_rope_head_dim: int) -> Tensor:
        """Map [2Gd, 2Gd] from κ to what the latent has to carry, in output units: residual keys and values."""
        width = self._source.num_key_value_heads * self._source.head_dim
        residual = self._residual_map(qk_rope_head_dim)
        weigh = torch.zeros(2 * width, 2 * width, dtype=torch.float64, device=residual.device)
        weigh[:width, :width] = torch.block_diag(*self._key_roots[0]) @ residual
        weigh[width:, width:] = self._value_roots[0][0]
        return weigh

    def _residual_map(self, qk_rope_head_dim: int) -> Tensor:
        """Real map [Gd, Gd] from the keys to what the chosen rotary components leave of them."""
        pairs = qk_rope_head_dim // 2
        chosen = self._components.frequency[:pairs]
        encode = real_rows(self._components.encode[:pairs], chosen, self._half)
        # decode·u as rows over keys: the real form of a complex column is the transpose of that of its conjugate row
        decode = real_rows(self._components.decode[:pairs].conj(), chosen, self._half).T
        width = self._source.num_key_value_heads * self._source.head_dim
        identity = torch.eye(width, dtype=torch.float64, device=decode.device)
        return identity - decode @ encode

    def _key_metric(self) -> Tensor:
        """M_k,g = Σ_{h∈g} λ_h E[q̃_h q̃_hᵀ] [G, d, d], q̃ the un-rotated queries of the converted layer."""
        nope = self._query_maps(0)
        metric = self._head_weight[:, None, None] * (nope @ self._statistics.queries @ nope.transpose(1, 2))
        return metric.view(self._source.num_key_value_heads, -1, *metric.shape[1:]).sum(dim=1)

    def _value_metric(self) -> Tensor:
        """[Gd, Gd]: Σ over pairs of heads of overlap · W_o,hᵀ W_o,h'. The errors of heads that look at the same tokens add up
        in the output, those of heads that look elsewhere do not."""
        source = self._source
        groups, repeats, dim = source.num_key_value_heads, source.heads_per_group, source.head_dim
        outer = source.o_weight.double()
        products = (outer.T @ outer).view(groups * repeats, dim, groups * repeats, dim)
        products = products * self._statistics.overlap[:, None, :, None]
        return products.view(groups, repeats, dim, groups, repeats, dim).sum(dim=(1, 4)).reshape(groups * dim, -1)

    def _query_maps(self, qk_rope_head_dim: int) -> Tensor:
        """Q_h [H, d + P, d]: the un-rotated queries, turned by the mean rotation, then the readers of the rotary key."""
        source, pairs, half = self._source, qk_rope_head_dim // 2, self._half
        heads = source.num_attention_heads
        frequencies = torch.arange(half, device=self._statistics.rotation.device)
        nope = real_rows(self._statistics.rotation.conj()[..., None], frequencies, half)
        chosen = self._components.frequency[:pairs]
        group_of_head = torch.arange(heads, device=chosen.device) // source.heads_per_group
        decode_HJ = self._components.decode[:pairs].conj().T[group_of_head]
        return torch.cat([nope, real_rows(decode_HJ[..., None], chosen, half)], dim=1)  # no rotary rows in NoPE layers

    def _query_metric(self, latent_power: Tensor, up_keys: Tensor, pairs: int) -> Tensor:
        """[H, d + P, d + P]: λ_h E[k kᵀ] of the converted keys, what an error of a head's queries costs in output units.

        `latent_power` [R]: E[c²], the latent's rows are uncorrelated. The rotation turns each rotary pair evenly through its
        plane over the attended distances, and pairs are uncorrelated too: each row has half of its pair's power.
        """
        source, groups = self._source, self._source.num_key_value_heads
        nope = (up_keys * latent_power) @ up_keys.transpose(1, 2)  # [G, d, d]
        rope = self._rotary_power(pairs).repeat(2)
        metric = torch.stack([torch.block_diag(nope[group], rope.diag()) for group in range(groups)])
        metric = self._head_weight[:, None, None] * metric.repeat_interleave(source.heads_per_group, dim=0)
        # what no key reads costs nothing, and is still worth keeping where there is room: refinement may read it
        mean = metric.diagonal(dim1=1, dim2=2).mean().clamp_min(_TINY)
        return metric + _UNREAD * mean * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)

    def _query_factors(self, q_weight: Tensor, metric: Tensor, q_lora_rank: int) -> tuple[Tensor, Tensor]:
        """Queries at low rank: the best approximation of Σ_h E[(q_h − q̂_h)ᵀ metric_h (q_h − q̂_h)]."""
        inputs = self._statistics.inputs
        assert inputs is not None, "factorised queries need the second moments of the inputs"
        root, inverse = _roots(inputs[None])
        outer, outer_inverse = _roots(metric)
        heads = metric.shape[0]
        weighted = (outer @ (q_weight @ root[0]).unflatten(0, (heads, -1))).flatten(0, 1)
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        kept = (left[:, :q_lora_rank] * values[:q_lora_rank]).unflatten(0, (heads, -1))
        return right[:q_lora_rank] @ inverse[0], (outer_inverse @ kept).flatten(0, 1)


def _apply_heads(maps_HOd: Tensor, rows: Tensor) -> Tensor:
    """Per-head maps on rows [H·d, Y] -> [H·O, Y]."""
    heads = maps_HOd.shape[0]
    return (maps_HOd @ rows.double().view(heads, -1, rows.shape[-1])).flatten(0, 1)


def _roots(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive semi-definite matrices [..., n, n], and their pseudo-inverses."""
    eigenvalues, vectors = torch.linalg.eigh(metrics)
    root = eigenvalues.clamp_min(0).sqrt()
    keep = eigenvalues > _NEGLIGIBLE * eigenvalues[..., -1:]
    inverse = torch.where(keep, 1 / root.clamp_min(1e-300), 0.0)
    root = torch.where(keep, root, 0.0)
    flipped = vectors.transpose(-1, -2)
    return (vectors * root[..., None, :]) @ flipped, (vectors * inverse[..., None, :]) @ flipped
