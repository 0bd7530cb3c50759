"""Baselines of bench_fidelity.py: other ways to make MLA factors, written from their descriptions, in the same format.

`weights`: plain SVD of the weights with true rotary pairs. For each rotary frequency a real principal component analysis
across the key/value groups gives one rotary pair of the shared key (evenly spaced frequencies where there are fewer slots);
what that leaves of the keys goes un-rotated, and keys and values together through one SVD. Nothing is measured.

`transmla`: TransMLA's method (arXiv 2502.07864), written from its description: the same with second moments of
the activations on the calibration text, and keys and values balanced by their norms before the joint principal component
analysis. Where there are fewer slots than frequencies, adjacent frequencies are folded: they share a slot, which turns at
the fastest of them. `attended` weights tokens by the attention that they receive; it is a little
better than plain moments.

Letters: G groups, H heads, d head_dim, F = d/2 frequencies, S = P/2 rotary slots, X hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.stream import SourceStream
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.conversion import output_config
from xeco_convert.errors import OptionError
from xeco_convert.factorize import MlaAttention, SourceAttention
from xeco_convert.factorize.attention import source_projections
from xeco_convert.factorize.statistics import StatisticsAccumulator
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import ConversionPlan, make_plan
from xeco_convert.source_attention import read_attention

BASELINES = ("weights", "transmla")


def baseline_model(
    kind: str,
    source_model: Any,
    checkpoint: Path,
    widths: tuple[int, int],
    windows: CalibrationWindows | None,
    *,
    attended: bool = True,
) -> Any:
    """The source converted by a baseline at (kv_lora_rank, qk_rope_head_dim), float32.

    `windows` calibrate those baselines that measure. Raises `OptionError` where such a one gets none, or for widths that
    the source cannot have.
    """
    rank, rope_dim = widths
    plan = make_plan(CheckpointIndex.open(checkpoint), ConvertOptions(rank=rank, rope_dim=rope_dim))
    slots = rope_dim // 2
    if slots % (half := plan.source.geometry.head_dim // 2) and half % slots:
        raise OptionError(
            f"{kind}: expected a rotary width that divides head_dim, or a multiple of it, found {rope_dim}."
        )
    sources = _layers(kind, plan, windows, attended=attended)
    layers = [factors(source, moments, rank, slots, folded=kind == "transmla") for source, moments in sources]
    shapes = {
        item.layer: replace(item.shape, rope_index=mla.rope_index)
        for item, mla in zip(plan.converted, layers, strict=True)
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**output_config(plan, shapes)), dtype=torch.float32)
    state = {name: tensor for name, tensor in source_model.state_dict().items() if ".self_attn." not in name}
    for number, mla in enumerate(layers):
        module = plan.source.family.module_name(number)
        state |= {f"{module}.{name}": tensor for name, tensor in mla.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def _layers(
    kind: str, plan: ConversionPlan, windows: CalibrationWindows | None, *, attended: bool
) -> Iterator[tuple[SourceAttention, Tensor]]:
    """Each source layer and the second moments [2Gd, 2Gd] of its (keys, values), float64."""
    reader, device = TensorReader(plan.source.index), torch.device("cpu")
    if kind == "weights":
        for number in range(plan.source.geometry.num_hidden_layers):
            source = read_attention(plan.source, reader, number, device)
            joint = torch.cat([source.k_weight, source.v_weight]).double()
            yield source, joint @ joint.T  # those of white inputs
        return
    if windows is None:
        raise OptionError(f"{kind}: expected calibration text, found none; give --calibration.")
    for view in SourceStream(plan.source, windows, device).layers():
        source = read_attention(plan.source, reader, view.number, device)
        x_WTX = view.normed(view.inputs)
        if attended:
            statistics = StatisticsAccumulator(source, view.context())
            statistics.add(x_WTX, view.counts)
            yield source, statistics.result().attended
        else:
            yield source, plain_moments(source, x_WTX, view.counts)


def plain_moments(source: SourceAttention, x_WTX: Tensor, counts_WT: Tensor) -> Tensor:
    """Second moments [2Gd, 2Gd] of keys and values before rotation over the tokens that count, float64."""
    width = source.num_key_value_heads * source.head_dim
    total = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    for x_TX, counts_T in zip(x_WTX, counts_WT, strict=True):
        _, keys, values = source_projections(source, x_TX[None])
        joint = torch.cat([keys[0].flatten(1), values[0].flatten(1)], dim=1)[counts_T].double()
        total += joint.T @ joint
    return total / counts_WT.sum()


def factors(source: SourceAttention, moments: Tensor, rank: int, slots: int, *, folded: bool) -> MlaAttention:
    """The layer from the second moments [2Gd, 2Gd] of (keys, values), float32. `folded`: TransMLA's way to few slots, and
    its balance of norms."""
    dim, groups = source.head_dim, source.num_key_value_heads
    width = groups * dim
    rope_maps, frequencies = rotary_slots(moments[:width, :width], groups, slots, folded=folded)
    identity = torch.eye(width, dtype=torch.float64)
    weigh = torch.block_diag(identity - rope_maps.T @ rope_maps, identity)
    left = weigh @ moments @ weigh.T
    keys_power, values_power = left.diagonal()[:width].sum(), left.diagonal()[width:].sum()
    ratio = float((keys_power / values_power).sqrt()) if folded else 1.0
    scale = torch.cat([torch.ones(width), torch.full((width,), ratio)]).double()
    basis = torch.linalg.eigh(scale[:, None] * left * scale).eigenvectors.flip(1)[:, :rank]
    up = (basis / scale[:, None]).view(2, groups, dim, rank).transpose(0, 1)  # [G, keys and values, d, R]
    maps = torch.cat([(basis.T * scale) @ weigh, torch.cat([rope_maps, torch.zeros_like(rope_maps)], dim=1)])
    joint_weight = torch.cat([source.k_weight, source.v_weight]).double()
    joint_bias = None
    if source.k_bias is not None and source.v_bias is not None:
        joint_bias = maps @ torch.cat([source.k_bias, source.v_bias]).double()
    return MlaAttention(
        q_weight=_queries(source, source.q_weight, rope_maps),
        q_bias=None if source.q_bias is None else _queries(source, source.q_bias[:, None], rope_maps)[:, 0],
        kv_a_weight=maps @ joint_weight,
        kv_a_bias=joint_bias,
        kv_b_weight=up.reshape(groups, 2 * dim, rank).repeat_interleave(source.heads_per_group, dim=0).flatten(0, 1),
        o_weight=source.o_weight.double(),
        o_bias=source.o_bias,
        rope_index=frequencies,
    ).to(torch.float32)


def rotary_slots(moments: Tensor, groups: int, slots: int, *, folded: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Real rows [2S, Gd] that read the slots from the keys, real parts first, and the frequency that each turns at.

    Principal components across groups, the same for both parts of a pair: of each fold of frequencies or, not `folded`, of
    one frequency in its place. With more slots than frequencies several components of each.
    """
    half = moments.shape[0] // (2 * groups)
    step, components = max(1, half // slots), max(1, slots // half)
    fold = step if folded else 1
    parts = moments.view(groups, 2, half, groups, 2, half)
    even = parts[:, 0, :, :, 0] + parts[:, 1, :, :, 1]  # [G, F, G, F]: E[Re(z_{g,i} conj(z_{g',i'}))]
    rows = torch.zeros(2, slots, groups, 2, half, dtype=moments.dtype)
    frequencies: list[int] = []
    for first in range(0, half // step * step, step):
        inside = slice(first, first + fold)
        block = even[:, inside][..., inside].reshape(groups * fold, groups * fold)
        for vector in torch.linalg.eigh(block).eigenvectors.flip(1)[:, :components].T:
            for part in range(2):
                rows[part, len(frequencies), :, part, inside] = vector.view(groups, fold)
            frequencies.append(first)
    return rows.reshape(2 * slots, -1), tuple(frequencies)


def _queries(source: SourceAttention, rows: Tensor, rope_maps: Tensor) -> Tensor:
    """Query rows [H·d, Y] -> [H·(d + P), Y]: the un-rotated queries, then what reads the slots."""
    groups = source.num_key_value_heads
    own = rows.double().view(source.num_attention_heads, source.head_dim, -1)
    readers = rope_maps.view(-1, groups, source.head_dim).transpose(0, 1)  # [G, P, d]
    return torch.cat([own, readers.repeat_interleave(source.heads_per_group, dim=0) @ own], dim=1).flatten(0, 1)
