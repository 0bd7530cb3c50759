"""A source checkpoint as transformers reads it: configuration, class, how each layer attends, what each tensor is called.

Nothing here is decided by rules of our own: the configuration object, the parameters of the class (built without memory), the
tables of its rotary embedding, and which stored tensor becomes which parameter are transformers'. No weight is read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.checkpoint.dtypes import STORED_AS
from xeco_convert.errors import CheckpointError, UnsupportedModelError, XecoWarning, reason_of, shown
from xeco_convert.families import AttentionGeometry, FamilySpec, LayerKind, family_for, family_within, wrapper_of
from xeco_convert.families.spec import FUSED, refuse_quantised
from xeco_convert.pretrained import auto_class, plain_outputs, read_config
from xeco_convert.tensor_names import TensorNames, resolve_names

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A source, bound once: files, family, transformers' configuration and class.

    `index` has the names under which transformers looks for tensors (files that leave out the base model's prefix get it);
    `config` is the configuration of the text model, `values` are its fields as transformers resolved them; `skeleton` is the
    whole model on torch's meta device; `names` says which stored tensors make up a parameter. Of a model around a text model,
    `wrapper` is how its classes begin, and `family` has the names of the text model's tensors within it.
    """

    index: CheckpointIndex
    family: FamilySpec
    wrapper: str | None
    config: Any
    values: Mapping[str, Any]
    geometry: AttentionGeometry
    kinds: tuple[LayerKind, ...]
    skeleton: Any
    names: TensorNames

    @property
    def model_type(self) -> str:
        """model_type of the whole model."""
        return str(self.skeleton.config.model_type)

    @property
    def decoder(self) -> Any:
        """The model without its head, on the meta device."""
        return self.skeleton.get_decoder()

    @property
    def logit_softcap(self) -> float | None:
        """The bound of the scores, if they have one."""
        value = self.values.get(self.family.attention_softcap)
        return None if not value else float(value)

    @property
    def norm_eps(self) -> float:
        """The eps of the norms."""
        return self.family.norm_eps(self.values)

    def projection(self, which: str, layer: int) -> str:
        """Name of a projection or norm of the attention, without .weight."""
        return self.family.attention[which].format(layer=layer)

    def attention_of(self, decoder_layer: nn.Module) -> nn.Module:
        """The attention module of a decoder layer of transformers' class."""
        return decoder_layer.get_submodule(self.family.module)

    def norm_of(self, which: str) -> str | None:
        """How queries (q_norm) or keys (k_norm) are normalised: "head", each head by itself, "all" rows together, or not at all.

        Raises `UnsupportedModelError` for another norm than an RMSNorm over one or the other.
        """
        if which not in self.family.attention:
            return None
        name = self.projection(which, 0)
        norm = self.skeleton.get_submodule(name)
        heads = self.geometry.num_attention_heads if which == "q_norm" else self.geometry.num_key_value_heads
        kinds = {heads * self.geometry.head_dim: "all", self.geometry.head_dim: "head"}
        width = norm.weight.numel()
        if width not in kinds or not type(norm).__name__.endswith("RMSNorm"):
            raise UnsupportedModelError(
                f"{name}: expected an RMSNorm over a head of {self.geometry.head_dim} rows, or over all "
                f"{heads * self.geometry.head_dim}, found {type(norm).__name__} over {width}; this version does not know such a "
                "norm."
            )
        return kinds[width]

    @property
    def residual_scale(self) -> float:
        """What the parts of a layer are multiplied by before they are added (Granite)."""
        return float(self.values.get(self.family.residual_scale) or 1.0)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by before the first layer."""
        if self.family.embedding_scale == "sqrt(hidden_size)":
            return math.sqrt(self.geometry.hidden_size)
        return float(self.values.get(self.family.embedding_scale) or 1.0)

    def parameter_or_tied(self, name: str) -> str:
        """The parameter itself where it is stored, else the one that it is tied to: transformers ties the missing one of a pair,
        whichever it is, and keeps both where both are stored and differ."""
        if name in self.names.parameters:
            return name
        return next(other for pair in self.names.tied.items() for other in pair if name in pair and other != name)

    def stored_name(self, name: str) -> str:
        """Name in the index of the one tensor that a parameter, or what it is tied to, is stored as."""
        return self.names.parameters[self.parameter_or_tied(name)].stored[0][1]

    def runnable_config(self) -> Any:
        """The configuration for running layers in float32, with an implementation of attention that computes all of it."""
        config = plain_outputs(deepcopy(self.config))
        # transformers' fused attention leaves the cap out without a word, or is not there for a class
        fused = self.logit_softcap is None and getattr(self.skeleton, "_supports_sdpa", False)
        config._attn_implementation = "sdpa" if fused else "eager"
        config.dtype = torch.float32
        return config

    def read_parameter(self, name: str, read: ReadTensor) -> Tensor:
        """The parameter `name` of transformers' class; `read(stored name)` gives tensors of the files. Experts that are
        stored one by one are put together as transformers does it."""
        parts = self.names.parameters[name]
        if parts.converter is None:
            return read(parts.stored[0][1])
        return _assembled(name, parts.converter, parts.stored, read, self.skeleton)


def open_source(index: CheckpointIndex) -> SourceModel:
    """Bind a checkpoint to the family and to transformers' class of its config.json.

    Raises `UnsupportedModelError` for models that are not converted, and `CheckpointError` where transformers does not take
    the configuration, or the files do not hold what its class needs.
    """
    wrapper = wrapper_of(index.config)
    if wrapper is None:  # refused by what the file says, in which transformers might find a fault of another kind
        family_for(index.config)
    for raw in _parts(index.config):
        _check_model_type(raw)
        refuse_quantised(raw)
        _check_layers(index, raw.get("num_hidden_layers"))
    whole = read_config(index.config)
    config = whole if wrapper is None else whole.get_text_config()
    values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    family = family_for(values) if wrapper is None else family_within(index.config["model_type"], values)
    geometry = family.geometry(values)
    for part in _parts(whole.to_dict()):
        _check_layers(index, part.get("num_hidden_layers"))
    family.check_config(values)
    family.check_numbers(values)
    skeleton = build_skeleton(whole)
    if wrapper is not None:
        family = family.within(*_places(skeleton))
    names = resolve_names(index, skeleton)
    source = SourceModel(
        index=replace(index, headers=names.headers, files=names.files, stored_names=names.stored_names),
        family=family,
        wrapper=wrapper,
        config=config,
        values=values,
        geometry=geometry,
        kinds=(),
        skeleton=skeleton,
        names=names,
    )
    _check_parameters(source)
    _warn_of_fields_without_effect(index.config, whole, family)
    if wrapper is not None:
        _warn_of_fields_without_effect(index.config.get("text_config") or {}, config, family)
    # tables are computed last, when the widths are known to be those of the weights: they may be absurd
    return replace(source, kinds=_layer_kinds(family, values, config, skeleton, geometry))


def _check_layers(index: CheckpointIndex, count: Any) -> None:
    """Before anything is made for each layer: the number may be absurd."""
    if isinstance(count, int) and count > len(index.headers):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {shown(count)}, but the weights hold {len(index.headers)} tensors; the two do "
            "not belong together."
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A configuration and those of its parts."""
    return [config, *(value for value in config.values() if isinstance(value, Mapping))]


def _check_model_type(raw: Mapping[str, Any]) -> None:
    """transformers takes any value for the model_type of a part, and stumbles over it later."""
    if not isinstance(raw.get("model_type"), str | None):
        raise CheckpointError(
            f"config.json: expected a name for every model_type, found {raw['model_type']!r}; take config.json from the model's "
            "own folder."
        )


def build_skeleton(config: Any) -> Any:
    """transformers' model of a configuration that writes text, on the meta device. Raises `CheckpointError`."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False).eval()
    except Exception as error:  # constructors of many classes, given any numbers
        raise CheckpointError(
            f"config.json: transformers cannot build the model that it describes ({reason_of(error)}); take config.json from "
            "the model's own folder."
        ) from None


def _places(skeleton: Any) -> tuple[str, str]:
    """Names of the decoder of text and of the output head in a model around them."""
    names = {module: name for name, module in skeleton.named_modules()}
    return names[skeleton.get_decoder()], names[skeleton.get_output_embeddings()]


def rotary_embedding(config: Any, skeleton: Any) -> nn.Module:
    """The rotary embedding of a model's class, on the CPU. Raises `CheckpointError` for settings that it does not take."""
    try:
        return type(skeleton.get_decoder().rotary_emb)(config=config)  # type: ignore[no-any-return]
    except Exception as error:
        raise CheckpointError(
            f"config.json: transformers cannot rotate by these rope_parameters ({reason_of(error)}); take config.json from the "
            "model's own folder."
        ) from None


def _layer_kinds(
    family: FamilySpec, values: Mapping[str, Any], config: Any, skeleton: Any, geometry: AttentionGeometry
) -> tuple[LayerKind, ...]:
    """How each layer attends; how wide it rotates is read from the tables of transformers' rotary embedding."""
    rotary, widths = rotary_embedding(config, skeleton), {}
    for kind in dict.fromkeys(values["layer_types"]) if family.rope_of_layer_type else (None,):
        try:
            cos, _ = rotary(
                torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), *([] if kind is None else [kind])
            )
        except Exception as error:
            raise CheckpointError(
                f"config.json: transformers cannot rotate by these rope_parameters ({reason_of(error)}); take config.json "
                "from the model's own folder."
            ) from None
        if not bool(cos.isfinite().all()):
            raise CheckpointError("config.json: rope_parameters give angles that are not finite; correct rope_theta.")
        widths[kind] = cos.shape[-1]
    for width in widths.values():
        if width != geometry.head_dim and (not family.partial_rotary or width > geometry.head_dim):
            raise UnsupportedModelError(
                f"config.json: {family.model_type} rotates whole heads of {geometry.head_dim} rows, found settings that "
                f"rotate {width}; remove partial_rotary_factor if the model does not use it."
            )
    types = values["layer_types"] if family.rope_of_layer_type else [None] * geometry.num_hidden_layers
    return tuple(family.layer_kind(values, layer, widths[kind]) for layer, kind in enumerate(types))


def _assembled(
    name: str, converter: Any, stored: tuple[tuple[str, str], ...], read: ReadTensor, skeleton: Any
) -> Tensor:
    """A parameter that several stored tensors make up, by transformers' own operations."""
    own = deepcopy(converter)
    for pattern, one in stored:
        own.add_tensor(name, one, pattern, read(one))
    assembled = own.convert(name, model=skeleton, config=skeleton.config)[name]
    whole: Tensor = assembled[0] if isinstance(assembled, list) else assembled
    return whole


def _check_parameters(source: SourceModel) -> None:
    """Every parameter of the class must be there, in its shape. Raises `CheckpointError`."""
    state, names, index = source.skeleton.state_dict(), source.names, source.index
    for name, parameter in state.items():
        if name not in names.parameters:
            if names.is_tied(name):
                continue
            raise CheckpointError(
                f"{index.folder}: {name} {list(parameter.shape)} is missing; download the checkpoint again."
            )
        _check_shape(source, name, tuple(parameter.shape))
    geometry = source.geometry
    attention: Any = source.attention_of(source.decoder.layers[0])
    if not (isinstance(attention.scaling, int | float) and 0 < attention.scaling < math.inf):
        raise CheckpointError(
            f"config.json: transformers would scale the scores by {shown(attention.scaling)}, expected a positive number; take "
            "config.json from the model's own folder."
        )
    heads, groups = geometry.num_attention_heads, geometry.num_key_value_heads
    expected = [count * geometry.head_dim for count in (heads, groups, groups)]
    fused = source.family.attention.get(FUSED, "").rpartition(".")[2]
    if fused:
        actual, expected = [attention.get_submodule(fused).weight.shape[0]], [sum(expected)]
    else:
        actual = [attention.get_submodule(which).weight.shape[0] for which in ("q_proj", "k_proj", "v_proj")]
    if actual != expected:
        raise UnsupportedModelError(
            f"config.json: expected projections of {expected} rows for {heads} heads in {groups} groups of "
            f"{geometry.head_dim}, found {actual} in transformers' class; this version does not understand the model."
        )


def _check_shape(source: SourceModel, name: str, shape: tuple[int, ...]) -> None:
    parts, headers = source.names.parameters[name], source.index.headers
    for _, stored in parts.stored:
        _check_dtype(source.index, stored)
    if parts.converter is None:
        stored = parts.stored[0][1]
        stored_shape = headers[stored].shape
        if stored_shape != shape:
            raise CheckpointError(
                f"{source.index.files[stored]}: {stored} has the shape {list(stored_shape)}, expected {list(shape)} from "
                "config.json; the two do not belong together."
            )
        return
    first = parts.stored[0][1]
    where = f"{source.index.files[first]}: {first} and its like ({len(parts.stored)} tensors)"
    try:
        with torch.device("meta"):
            assembled = source.read_parameter(name, lambda one: torch.empty(headers[one].shape))
    except Exception as error:  # operations of transformers on tensors that do not fit each other
        raise CheckpointError(
            f"{where} cannot be put together to {name} {list(shape)} ({reason_of(error)}); the weights do not belong to this "
            "config.json, or some are missing."
        ) from None
    if tuple(assembled.shape) != shape:
        raise CheckpointError(
            f"{where} make up {name} in the shape {list(assembled.shape)}, expected {list(shape)} from config.json; some are "
            "missing, or the two do not belong together."
        )


_FLOATING = tuple(STORED_AS.values())


def _check_dtype(index: CheckpointIndex, name: str) -> None:
    if index.headers[name].dtype not in _FLOATING:
        raise CheckpointError(
            f"{index.files[name]}: {name} has the dtype {index.headers[name].dtype}, expected {', '.join(_FLOATING)}; save a "
            "dequantised copy first."
        )


def _warn_of_fields_without_effect(raw: Mapping[str, Any], config: Any, family: FamilySpec) -> None:
    """Fields whose names speak of attention and that transformers' class does not know: it computes without them, and so does
    the conversion; the user should know, in case these weights belong to another architecture."""
    known = type(config)().to_dict().keys() | set(getattr(config, "attribute_map", {}))
    for name, value in raw.items():
        if name in known or value in (None, False, 0, [], {}, "") or not _speaks_of_attention(name):
            continue
        if family.has_key_norm and "qk" in name and "norm" in name:  # says what the class does always
            continue
        warnings.warn(
            f"config.json: {name[:_LONGEST_NAME]} = {shown(value)} is no field of transformers' {type(config).__name__}, which "
            "computes without it; so does the conversion.",
            XecoWarning,
            stacklevel=2,
        )


def _speaks_of_attention(name: str) -> bool:
    return any(word in name for word in _ATTENTION_WORDS) and name not in _READ_BY_TRANSFORMERS


_LONGEST_NAME = 60
_ATTENTION_WORDS = (
    "attn",
    "attention",
    "rotary",
    "alibi",
    "qk_",
    "qkv",
    "softcap",
    "position_embedding",
    "sink",
    "clip_",
    "logn",
)
# Fields that transformers reads although they are none of the class: old spellings, and choices of implementation.
_READ_BY_TRANSFORMERS = frozenset(
    ("rotary_pct", "rotary_emb_base", "partial_rotary_factor", "attn_implementation", "_attn_implementation")
)
