"""The options of a conversion: one field is one flag is one help line, in the command line and in the Python API."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from xeco_convert.errors import OptionError
from xeco_convert.initialisation import INITIALISATIONS, Initialisation, initialisation_from, initialisation_options
from xeco_convert.ranks.policy import RankPolicy, policy_from, policy_options
from xeco_convert.settings import default_of, option, option_fields, require

DTYPES = ("float32", "bfloat16", "float16")
QK_NORMS = ("exact", "regression")
# What --cache-bits stands for: bits of the latent and of the rotary key. A KV size chooses among them for each layer, where
# ranks are given it is the first.
CACHE_BITS = {
    "16": ((16, 16),),
    "8": ((8, 8),),
    "4": ((4, 8), (4, 4)),
    "3": ((3, 6), (3, 5), (3, 4)),
    "2": ((2, 6), (2, 5), (2, 4)),
    "auto": ((16, 16), (8, 8), (4, 6), (4, 4), (3, 6), (3, 5), (3, 4), (2, 6), (2, 5), (2, 4)),
}
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _about_inits() -> str:
    return (
        "How the factors are made: " + " or ".join(f"{entry.name} ({entry.about})" for entry in INITIALISATIONS) + "."
    )


@dataclass(frozen=True, kw_only=True, init=False)
class ConvertOptions:
    """What `xeco-convert IN OUT` does, made of options by their names: `ConvertOptions(rank=128, refine=True)`.

    Fields are the options that every conversion has; those of the rank policy and of the initialisation are the fields of
    `policy` and `initialisation`. `None` means: chosen by the program, and said in the plan. Raises `OptionError` on
    construction for values that are wrong whatever the model is (those that depend on the model are refused by the plan,
    before any weight is read), and `TypeError` for names that are no options.
    """

    policy: RankPolicy
    initialisation: Initialisation
    init: str = option(_about_inits, "calibrated", choices=INITIALISATIONS.names, recorded=True)
    rope_dim: int | None = option(
        "qk_rope_head_dim: width of the shared rotary key. [64 or head_dim where that is smaller; paper: head_dim / 2]",
        metavar="P",
    )
    q_rank: int | None = option("q_lora_rank: also factorise the queries at this rank. [off]", metavar="N")
    latent_norm: bool = option("Put an RMSNorm on the latent (kv_a_layernorm), as DeepSeek does.", False)
    portable: bool = option(
        "Keep to what stock DeepSeek-V3 can hold, so that `xeco-convert export` loses nothing: a latent norm, the same widths "
        "in every layer, the fastest P/2 rotary frequencies once each.",
        False,
    )
    cache_bits: str = option(
        "Bits of a cached number: 16 (the model's dtype as it is), 8, 4, 3 or 2 (of latents; rotary keys get 8 beside 4, or 6 "
        "beside 3 and 2, or as few as 4 where a KV size chooses them), or auto, chosen for each layer with its widths (needs a "
        "KV size).",
        "16",
        choices=tuple(CACHE_BITS),
    )
    qk_norm: str = option(
        "Keys behind a norm (Qwen3, OLMo 2, Gemma 3): exact, computed by the source's own projections and norm before they "
        "become latents; or regression, linear keys in their place, for a plain kv_a projection.",
        "exact",
        choices=QK_NORMS,
    )
    seed: int = option("Seed of sampling and regression.", 0, metavar="N")
    layers: str | None = option(
        "Layers to convert, as 0-3,7; the others keep their attention. [all]", metavar="LIST", recorded=True
    )
    dtype: str | None = option("Store weights in this dtype. [the source's]", choices=DTYPES)
    device: str = option("Device for the decompositions: cpu, cuda, cuda:1, ...", "cpu", metavar="DEVICE")
    max_shard_size: str = option("Largest weight file, e.g. 5GB or 500MB.", "5GB", metavar="SIZE")
    revision: str | None = option("Branch, tag or commit, when IN is a hub id.", metavar="REV")
    overwrite: bool = option("Replace OUT if it exists.", False)
    verify: bool = option("Check a few layers against the source's attention, and report the error of each.", False)

    def __init__(self, **values: Any) -> None:
        known = self.fields()
        for name in values:
            if name not in known:
                raise TypeError(f"ConvertOptions got an unexpected keyword argument '{name}'")
        for name, item in option_fields(type(self)).items():
            object.__setattr__(self, name, values.get(name, default_of(item)))
        self._check()
        policy = policy_from(values)
        object.__setattr__(self, "policy", policy)
        if self.cache_bits == "auto" and not policy.chooses_bits:
            raise OptionError(
                "--cache-bits auto: bits are chosen within a KV size: give --kv-size, or a number of bits."
            )
        if self.portable and self.cache_bits != "16":
            raise OptionError(
                f"--cache-bits {self.cache_bits}: a stock DeepSeek model caches numbers of its own dtype; leave it out with "
                "--portable."
            )
        object.__setattr__(self, "initialisation", initialisation_from(self.init, values, policy))

    def _check(self) -> None:
        for flag, value, values in (
            ("--qk-norm", self.qk_norm, QK_NORMS),
            ("--cache-bits", self.cache_bits, tuple(CACHE_BITS)),
            ("--dtype", self.dtype, (None, *DTYPES)),
        ):
            names = ", ".join(name for name in values if name)
            require(value in values, flag, f"one of {names}", value)
        require(self.q_rank is None or self.q_rank >= 1, "--q-rank", "a whole number of at least 1", self.q_rank)
        rope = self.rope_dim
        require(rope is None or (rope >= 2 and rope % 2 == 0), "--rope-dim", "an even number of at least 2", rope)
        parse_size(self.max_shard_size)
        if self.layers is not None:
            parse_layers(self.layers)

    @property
    def cache_bits_on_offer(self) -> tuple[tuple[int, int], ...]:
        """Bits of latent and rotary key that layers may get."""
        return CACHE_BITS[self.cache_bits] if self.policy.chooses_bits else CACHE_BITS[self.cache_bits][:1]

    @property
    def has_latent_norm(self) -> bool:
        """Whether the latents get a norm."""
        return self.latent_norm or self.portable

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """All options by name: --init, those of the rank policies and initialisations, those of every conversion."""
        own = option_fields(cls)
        return {"init": own["init"]} | policy_options() | initialisation_options() | own

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options, in the order of their help."""
        return tuple(cls.fields())

    def replace(self, **changes: Any) -> ConvertOptions:
        """The same options but for some."""
        return ConvertOptions(**self.values() | changes)

    def values(self) -> dict[str, Any]:
        """The value of every option by name; the default for those that policy and initialisation do not have."""
        owners = (self, self.policy, self.initialisation)
        chosen = {name: getattr(owner, name) for owner in owners for name in option_fields(type(owner))}
        return {name: chosen.get(name, default_of(item)) for name, item in self.fields().items()}


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB (10⁹) or 512MiB (2²⁰). Raises `OptionError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise OptionError(f"--max-shard-size: expected a size such as 5GB or 500MB, found {text!r}; change the value.")
    size_bytes = int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    if size_bytes < 1:
        raise OptionError(f"--max-shard-size: expected at least one byte, found {text!r}; change the value.")
    return size_bytes


def parse_layers(text: str) -> tuple[int, ...]:
    """Sorted layer numbers of a list such as 0-3,7. Raises `OptionError`."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers: expected a list such as 0-3,7, found {text!r}; change the value.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))
