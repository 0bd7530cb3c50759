"""Which rotary components of all groups share the one rotary key, and what the others are worth without rotation.

Rotary pairs are complex numbers: z_{g,i} = k_{g,i} + j·k_{g,i+d/2}, y_{h,i} likewise of the queries, and a score is
scale · Σ_i Re(conj(y_{h,i}) · z_{g(h),i} · e^{-jθ_i(t-s)}). A complex linear map across groups commutes with the rotation, so
the principal directions of a frequency are complex (docs/conversion.md, step 1).

Letters: G groups, H heads, d head_dim, F = d/2 frequencies, J = P/2 selected components.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from xeco_convert.factorize.layer_weights import SourceAttention
from xeco_convert.factorize.statistics import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class RotaryComponents:
    """All G·F components of a layer, best first; F counts the pairs that are rotated.

    `frequency` [G·F] int64; `gain` [G·F]: output error that a rotary slot saves over leaving the component un-rotated;
    `encode` [G·F, G] and `decode` [G·F, G] complex: u = encode · z reads the component from the groups' keys of that
    frequency, decode · u puts it back.
    """

    frequency: Tensor
    gain: Tensor
    encode: Tensor
    decode: Tensor

    def weighed(self, ratio: float) -> RotaryComponents:
        """The same, had all output errors counted `ratio` times as much."""
        root = ratio**0.5
        return dataclasses.replace(self, gain=self.gain * ratio, encode=self.encode * root, decode=self.decode / root)


def rotary_components(
    source: SourceAttention, statistics: LayerStatistics, head_weight: Tensor, *, one_per_frequency: bool = False
) -> RotaryComponents:
    """Principal complex directions across groups of every frequency, weighted by how strongly the queries look at them.

    `head_weight` [H] turns a squared score error of a head into a squared output error (λ_h of docs/conversion.md).
    `one_per_frequency`: the best component of each frequency first, fastest frequency first, as a stock rotary key has
    them; then the others.
    """
    groups, half, rotated = source.num_key_value_heads, source.head_dim // 2, source.rotated
    width = groups * source.head_dim
    moments_FGG = complex_moments(statistics.attended[:width, :width], groups)[:rotated]
    if rotated == 0:
        return _no_components(moments_FGG)
    lost_HF = (statistics.rotation_scale**2 - statistics.rotation.abs().square()).clamp_min(0)[:, :rotated]
    power_HF = statistics.queries.diagonal(dim1=1, dim2=2).unflatten(1, (2, half)).sum(dim=1)[:, :rotated]
    weight_GF = (head_weight[:, None] * power_HF * lost_HF).view(groups, -1, rotated).sum(dim=1)
    # A group that no query looks at would make the weights singular; its components come last anyway. Where the output
    # depends on no score at all (queries, values or o_proj are zero), every component is as good as the next.
    largest = float(weight_GF.max())
    weight_FG = weight_GF.T.clamp_min(1e-9 * largest) if largest > 0 else torch.ones_like(weight_GF.T)
    root = weight_FG.sqrt().to(moments_FGG.dtype)
    eigenvalues, vectors = torch.linalg.eigh(root[:, :, None] * moments_FGG * root[:, None, :])
    gain, order = eigenvalues.clamp_min(0).flatten().sort(descending=True, stable=True)
    if one_per_frequency:
        best = torch.arange(rotated, device=order.device) * groups + groups - 1  # eigenvalues of a frequency rise
        others = order[~torch.isin(order, best)]
        order = torch.cat([best, others])
        gain = eigenvalues.clamp_min(0).flatten()[order]
    gain = gain if largest > 0 else torch.zeros_like(gain)
    frequency = order // groups
    direction = vectors.transpose(1, 2).flatten(0, 1)[order]  # [G·F, G], one eigenvector a row
    chosen_root = root[frequency]
    return RotaryComponents(
        frequency=frequency, gain=gain, encode=direction.conj() * chosen_root, decode=direction / chosen_root
    )


def _no_components(moments_FGG: Tensor) -> RotaryComponents:
    """Those of a layer without rotation."""
    none, rows = moments_FGG.new_zeros(0).real, moments_FGG.new_zeros(0, moments_FGG.shape[-1])
    return RotaryComponents(frequency=none.to(torch.int64), gain=none, encode=rows, decode=rows)


def complex_moments(gram: Tensor, groups: int) -> Tensor:
    """E[z_g z_g'*] of each frequency [F, G, G] complex, from the real second moments [G·d, G·d] of half-split rows."""
    parts = gram.view(groups, 2, -1, groups, 2, gram.shape[0] // (2 * groups)).diagonal(dim1=2, dim2=5)
    (rr, ri), (ir, ii) = (part.unbind(dim=2) for part in parts.unbind(dim=1))  # each [G, G', F]
    return torch.complex(rr + ii, ir - ri).permute(2, 0, 1).contiguous()


def real_rows(rows_JG: Tensor, frequency_J: Tensor, half: int) -> Tensor:
    """Complex rows over groups, each at one frequency, as real rows over half-split keys: [..., J, G] to [..., 2J, G·d].

    Row j of the first half gives Re(Σ_g rows[j, g] · z_g,i), row j of the second half its imaginary part.
    """
    re, im = rows_JG.real, rows_JG.imag
    parts = torch.stack([torch.stack([re, -im], dim=-1), torch.stack([im, re], dim=-1)], dim=-4)[..., None]
    index = frequency_J[:, None, None, None].expand(parts.shape)
    return parts.new_zeros(*parts.shape[:-1], half).scatter_(-1, index, parts).flatten(-3).flatten(-3, -2)
