"""The plan of a conversion, made from config.json and headers alone: what is converted, copied, dropped, and how large.

Nothing here reads a weight. Every tensor of the source has one fate, and everything that can be refused is refused here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex, TensorHeader
from xeco_convert.errors import CheckpointError, OptionError
from xeco_convert.factorize.shapes import MlaShape
from xeco_convert.families import AttentionGeometry, FamilySpec, family_for
from xeco_convert.families.spec import PROJECTIONS
from xeco_convert.options import ConvertOptions, parse_layers, parse_share
from xeco_convert.ranks.budget import Widths, default_multiple, rope_step

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATING = tuple(_DTYPE_NAMES.values())


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: the widths it gets, or None where it keeps its attention."""

    layer: int
    shape: MlaShape | None


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do. `ranks_are_final` is False while a policy still has to look at the spectra: the ranks
    given are upper bounds then."""

    index: CheckpointIndex
    family: FamilySpec
    geometry: AttentionGeometry
    options: ConvertOptions
    layers: tuple[LayerPlan, ...]
    copied: tuple[TensorHeader, ...]
    dropped: tuple[str, ...]
    ranks_are_final: bool

    @property
    def converted_layers(self) -> tuple[int, ...]:
        return tuple(plan.layer for plan in self.layers if plan.shape is not None)

    @property
    def dtype(self) -> str:
        """Dtype of all weights written, in safetensors' words: the option's, or the source's first query projection's."""
        if self.options.dtype is not None:
            return _DTYPE_NAMES[self.options.dtype]
        return self.index.headers[f"{self.projection('q_proj', 0)}.weight"].dtype

    def projection(self, which: str, layer: int) -> str:
        """Name of a source projection, without .weight."""
        return self.family.attention[which].format(layer=layer)

    def module_name(self, layer: int) -> str:
        """Name of the attention module that holds the projections."""
        return self.projection("q_proj", layer).rpartition(".")[0]

    def converted_headers(self, layer: int) -> list[TensorHeader]:
        """Tensors that replace the attention of a converted layer."""
        shape = self.layers[layer].shape
        assert shape is not None
        module = self.module_name(layer)
        return [TensorHeader(name=f"{module}.{n}", dtype=self.dtype, shape=s) for n, s in shape.tensors().items()]

    def output_headers(self) -> list[TensorHeader]:
        """All tensors of the output, in the order of the source's layers: outer tensors, then layer by layer."""
        converted = [header for layer in self.converted_layers for header in self.converted_headers(layer)]
        return sorted([*self.copied, *converted], key=lambda header: _natural(header.name))

    def kv_numbers_per_token(self) -> list[int]:
        """Numbers that each layer of the output caches per token."""
        kept = self.geometry.cache_width
        return [kept if plan.shape is None else plan.shape.cache_width for plan in self.layers]

    def with_widths(self, widths: Sequence[Widths]) -> ConversionPlan:
        """The plan with the policy's choice, one for each converted layer."""
        chosen = dict(zip(self.converted_layers, widths, strict=True))
        layers = tuple(
            dataclasses.replace(plan, shape=_with_widths(plan.shape, chosen[plan.layer]))
            if plan.shape is not None
            else plan
            for plan in self.layers
        )
        return dataclasses.replace(self, layers=layers, ranks_are_final=True)

    def with_rope_index(self, layer: int, rope_index: tuple[int, ...] | None) -> ConversionPlan:
        """The plan with the rotary frequencies that a layer's factorisation chose."""
        layers = list(self.layers)
        shape = layers[layer].shape
        assert shape is not None
        layers[layer] = LayerPlan(layer=layer, shape=dataclasses.replace(shape, rope_index=rope_index))
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def kv_budget(self) -> int | None:
        """Numbers per token that the converted layers may cache together; None where no KV size was asked for."""
        options, width = self.options, self.geometry.cache_width
        if options.kv_size is not None:
            total = int(parse_share(options.kv_size) * width * len(self.layers) + 1e-9)
        elif options.kv_bytes_per_token is not None:
            total = options.kv_bytes_per_token // DTYPE_BYTES[self.dtype]
        else:
            return None
        return total - width * (len(self.layers) - len(self.converted_layers))

    @property
    def rank_multiple(self) -> int:
        """Step of the widths that a KV budget is split into."""
        return self.options.rank_multiple or default_multiple(self.geometry.cache_width)


def make_plan(index: CheckpointIndex, options: ConvertOptions) -> ConversionPlan:
    """Check source and options against each other, and lay out the output.

    Raises `UnsupportedModelError`, `CheckpointError` or `OptionError`; reads no weight.
    """
    family = family_for(index.config)
    family.check_config(index.config)
    geometry = family.geometry(index.config)
    if geometry.num_hidden_layers > len(
        index.headers
    ):  # before anything is made for each layer: the number may be absurd
        raise CheckpointError(
            f"config.json: num_hidden_layers is {geometry.num_hidden_layers}, but the weights hold {len(index.headers)} tensors; "
            "the two do not belong together."
        )
    chosen = _chosen_layers(options, geometry)
    dropped = _check_tensors(index, family)
    biases = _biases(index, family, options)
    shape = _layer_shape(options, geometry, biases)
    converted = {
        f"{family.attention[which].format(layer=layer)}.{part}"
        for layer in chosen
        for which in PROJECTIONS
        for part in ("weight", "bias")
    }
    headers = (header for name, header in index.headers.items() if name not in converted and name not in dropped)
    copied = tuple(_stored_as(header, options) for header in headers)
    plan = ConversionPlan(
        index=index,
        family=family,
        geometry=geometry,
        options=options,
        layers=tuple(
            LayerPlan(layer=layer, shape=shape if layer in chosen else None)
            for layer in range(geometry.num_hidden_layers)
        ),
        copied=copied,
        dropped=dropped,
        ranks_are_final=options.energy is None and not options.has_budget,
    )
    _check_budget(plan)
    return plan


def _check_budget(plan: ConversionPlan) -> None:
    """Refuse a KV budget below one step for latent and rotary key in each layer, or below what kept layers take."""
    budget = plan.kv_budget
    least = (plan.rank_multiple + rope_step(plan.rank_multiple)) * len(plan.converted_layers)
    if budget is None or budget >= least:
        return
    kept = plan.geometry.cache_width * (len(plan.layers) - len(plan.converted_layers))
    total = plan.geometry.cache_width * len(plan.layers)
    smallest = least + kept
    flag = "--kv-size" if plan.options.kv_size is not None else "--kv-bytes-per-token"
    raise OptionError(
        f"{flag}: expected at least {smallest / total:.1%} ({smallest} numbers per token, "
        f"{smallest * DTYPE_BYTES[plan.dtype]} bytes) for {len(plan.converted_layers)} converted layers in steps of "
        f"{plan.rank_multiple}, found {(budget + kept) / total:.1%}; allow more, or lower --rank-multiple."
    )


def _with_widths(shape: MlaShape, widths: Widths) -> MlaShape:
    """The shape with other widths; frequencies not chosen yet are shown as the first one."""
    index = None if shape.rope_index is None else (0,) * (widths.qk_rope_head_dim // 2)
    return dataclasses.replace(
        shape, kv_lora_rank=widths.kv_lora_rank, qk_rope_head_dim=widths.qk_rope_head_dim, rope_index=index
    )


def _chosen_layers(options: ConvertOptions, geometry: AttentionGeometry) -> tuple[int, ...]:
    everything = tuple(range(geometry.num_hidden_layers))
    if options.layers is None:
        return everything
    chosen = parse_layers(options.layers)
    if chosen[-1] > everything[-1]:
        raise OptionError(f"--layers: expected layers from 0 to {everything[-1]}, found {chosen[-1]}; change the list.")
    return chosen


def _layer_shape(options: ConvertOptions, geometry: AttentionGeometry, biases: tuple[str, ...]) -> MlaShape:
    """Widths of a converted layer; the rank is an upper bound where a policy chooses it."""
    dim, calibrated = geometry.head_dim, options.init == "calibrated"
    full_rank = min(geometry.cache_width, geometry.hidden_size)
    most_rope = geometry.num_key_value_heads * dim if calibrated else dim
    full_q_rank = min(geometry.num_attention_heads * dim, geometry.hidden_size)
    _at_most("--rank", options.rank, full_rank, "the full rank of keys and values")
    _at_most("--rope-dim", options.rope_dim, most_rope, "all rotary rows" if calibrated else "head_dim")
    _at_most("--nope-dim", options.nope_dim, dim, "head_dim")
    _at_most("--q-rank", options.q_rank, full_q_rank, "the full rank of the queries")
    rope_dim = options.rope_dim or (min(64, dim) if calibrated else max(2, dim // 4 * 2))
    rank = full_rank if options.rank is None or options.energy is not None else options.rank
    nope_dim = dim if calibrated else dim - rope_dim
    return MlaShape(
        num_attention_heads=geometry.num_attention_heads,
        hidden_size=geometry.hidden_size,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope_dim if options.nope_dim is None else options.nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=dim,
        q_lora_rank=options.q_rank,
        latent_norm=options.latent_norm,
        rope_index=(0,) * (rope_dim // 2) if calibrated else None,
        biases=biases,
    )


def _at_most(flag: str, value: int | None, limit: int, what: str) -> None:
    if value is not None and value > limit:
        raise OptionError(
            f"{flag}: expected at most {limit} ({what} of this model), found {value}; choose a smaller value."
        )


def _biases(index: CheckpointIndex, family: FamilySpec, options: ConvertOptions) -> tuple[str, ...]:
    """Projections of the converted layer that have a bias, given those of the source's first layer."""
    present = {which: f"{family.attention[which].format(layer=0)}.bias" in index.headers for which in PROJECTIONS}
    # the calibrated latent carries the biases of keys and values itself; the published one adds them after expansion
    key_value = () if not present["k_proj"] else ("kv_a",) if options.init == "calibrated" else ("kv_a", "kv_b")
    return (("q",) if present["q_proj"] else ()) + key_value + (("o",) if present["o_proj"] else ())


def _check_tensors(index: CheckpointIndex, family: FamilySpec) -> tuple[str, ...]:
    """Compare headers with what the configuration calls for; the tensors that are left out of the output."""
    expected = family.expected_tensors(index.config)
    tied = bool(family.completed(index.config).get("tie_word_embeddings"))
    dropped = []
    for name, header in index.headers.items():
        if name in expected:
            _check_header(header, expected[name], index)
        elif family.is_ignored(name) or (tied and name == "lm_head.weight"):
            dropped.append(name)
        else:
            raise CheckpointError(
                f"{index.files[name]}: {name} is no tensor of a {family.model_type} model with this config.json; "
                "converting it unread could change the model. Check that config.json belongs to these weights."
            )
    for name, shape in expected.items():
        if name not in index.headers:
            raise CheckpointError(f"{index.folder}: {name} {list(shape)} is missing; download the checkpoint again.")
    return tuple(dropped)


def _check_header(header: TensorHeader, shape: tuple[int, ...], index: CheckpointIndex) -> None:
    where = f"{index.files[header.name]}: {header.name}"
    if header.shape != shape:
        raise CheckpointError(
            f"{where} has the shape {list(header.shape)}, expected {list(shape)} from config.json; "
            "the two do not belong together."
        )
    if header.dtype not in _FLOATING:
        raise CheckpointError(
            f"{where} has the dtype {header.dtype}, expected {', '.join(_FLOATING)}; save a dequantised copy first."
        )


def _stored_as(header: TensorHeader, options: ConvertOptions) -> TensorHeader:
    if options.dtype is None:
        return header
    return dataclasses.replace(header, dtype=_DTYPE_NAMES[options.dtype])


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key by which layer 10 follows layer 9."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def num_parameters(headers: Sequence[TensorHeader]) -> int:
    """Numbers stored in these tensors."""
    return sum(math.prod(header.shape) for header in headers)
