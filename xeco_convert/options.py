"""The options of a conversion: one field is one flag is one help line, in the command line and in the Python API."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.errors import OptionError

INITS = ("paper",)
DTYPES = ("float32", "bfloat16", "float16")
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _option(help_text: str, default: Any = None, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `xeco-convert IN OUT` does. `None` means: chosen by the program, and said in the plan.

    Raises `OptionError` on construction for values that are wrong whatever the model is; those that depend on the model
    (a rank above the full rank, a layer out of range) are refused by the plan, before any weight is read.
    """

    init: str = _option("Initialisation of the latent factors.", "paper", choices=INITS)
    rank: int | None = _option("kv_lora_rank: width of the KV latent of each layer.", metavar="N")
    energy: float | None = _option(
        "Rank per layer: keep singular values up to this share of the squared spectrum, rounded up to a multiple of 8.",
        metavar="SHARE",
    )
    rope_dim: int | None = _option("qk_rope_head_dim: width of the shared rotary key. [head_dim / 2]", metavar="P")
    nope_dim: int | None = _option("qk_nope_head_dim: un-rotated width of each head. [head_dim - P]", metavar="N")
    q_rank: int | None = _option("q_lora_rank: also factorise the queries at this rank. [off]", metavar="N")
    fixed_ends: bool = _option("With --energy: first and last layer take --rank instead.", False)
    latent_norm: bool = _option("Put an RMSNorm on the latent (kv_a_layernorm), as DeepSeek does.", False)
    layers: str | None = _option("Layers to convert, as 0-3,7; the others keep their attention. [all]", metavar="LIST")
    dtype: str | None = _option("Store weights in this dtype. [the source's]", choices=DTYPES)
    device: str = _option("Device for the decompositions: cpu, cuda, cuda:1, ...", "cpu", metavar="DEVICE")
    max_shard_size: str = _option("Largest weight file, e.g. 5GB or 500MB.", "5GB", metavar="SIZE")
    revision: str | None = _option("Branch, tag or commit, when IN is a hub id.", metavar="REV")
    overwrite: bool = _option("Replace OUT if it exists.", False)
    verify: bool = _option("Check a few layers against the source's attention, and report the error of each.", False)

    def __post_init__(self) -> None:
        _require(self.init in INITS, "--init", f"one of {', '.join(INITS)}", self.init)
        _require(self.dtype is None or self.dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        for flag, value in (("--rank", self.rank), ("--nope-dim", self.nope_dim), ("--q-rank", self.q_rank)):
            least = 0 if flag == "--nope-dim" else 1
            _require(value is None or value >= least, flag, f"a whole number of at least {least}", value)
        rope = self.rope_dim
        _require(rope is None or (rope >= 2 and rope % 2 == 0), "--rope-dim", "an even number of at least 2", rope)
        _require(self.energy is None or 0 < self.energy <= 1, "--energy", "a share in (0, 1]", self.energy)
        if self.rank is None and self.energy is None:
            raise OptionError(
                "no size was given for the KV latent: add --rank N (for example --rank 128) or --energy SHARE."
            )
        self._check_rank_policy()
        parse_size(self.max_shard_size)
        if self.layers is not None:
            parse_layers(self.layers)

    def _check_rank_policy(self) -> None:
        if self.fixed_ends and (self.rank is None or self.energy is None):
            raise OptionError(
                "--fixed-ends needs both --energy (for the inner layers) and --rank (for the first and last)."
            )
        if self.rank is not None and self.energy is not None and not self.fixed_ends:
            raise OptionError("--rank and --energy both set the rank: give one, or add --fixed-ends to use both.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options, in the order of their help."""
        return tuple(item.name for item in dataclasses.fields(cls))


def _require(holds: bool, flag: str, expected: str, found: object) -> None:
    if not holds:
        raise OptionError(f"{flag}: expected {expected}, found {found}; change the value.")


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
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers: expected a list such as 0-3,7, found {text!r}; change the value.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))
