"""The options of a conversion: one field is one flag is one help line, in the command line and in the Python API."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from xeco_convert.errors import OptionError

INITS = ("calibrated", "paper")
DTYPES = ("float32", "bfloat16", "float16")
QK_NORMS = ("exact", "regression")
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _option(help_text: str, default: Any = None, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "metavar": metavar, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `xeco-convert IN OUT` does. `None` means: chosen by the program, and said in the plan.

    Raises `OptionError` on construction for values that are wrong whatever the model is; those that depend on the model
    (a rank above the full rank, a layer out of range) are refused by the plan, before any weight is read.
    """

    init: str = _option(
        "How the factors are made: calibrated (closed form from the model's activations) or paper (X-EcoMLA as published).",
        "calibrated",
        choices=INITS,
    )
    kv_size: str | None = _option(
        "Size of the KV cache as a share of the source's, e.g. 25%; split over layers, latent and rotary key by sensitivity.",
        metavar="SHARE",
    )
    kv_bytes_per_token: int | None = _option("The same, as bytes per token of the whole model.", metavar="N")
    rank: int | None = _option("kv_lora_rank: width of the KV latent of each layer.", metavar="N")
    energy: float | None = _option(
        "Rank per layer: keep singular values up to this share of the squared spectrum, rounded up to a multiple of 8.",
        metavar="SHARE",
    )
    rope_dim: int | None = _option(
        "qk_rope_head_dim: width of the shared rotary key. [64 or head_dim where that is smaller; paper: head_dim / 2]",
        metavar="P",
    )
    rank_multiple: int | None = _option(
        "With a KV size: widths are multiples of this. [16, or less for caches below 256 numbers]", metavar="N"
    )
    nope_dim: int | None = _option(
        "paper: qk_nope_head_dim, un-rotated width of each head. [head_dim - P]", metavar="N"
    )
    q_rank: int | None = _option("q_lora_rank: also factorise the queries at this rank. [off]", metavar="N")
    fixed_ends: bool = _option("With --energy: first and last layer take --rank instead.", False)
    latent_norm: bool = _option("Put an RMSNorm on the latent (kv_a_layernorm), as DeepSeek does.", False)
    portable: bool = _option(
        "Keep to what stock DeepSeek-V3 can hold, so that `xeco-convert export` loses nothing: a latent norm, the same widths "
        "in every layer, the fastest P/2 rotary frequencies once each.",
        False,
    )
    calibration: str | None = _option(
        "Text to calibrate on: .txt, .md, .jsonl, .json, .csv, .tsv (also .gz), .parquet, or a data set's name. "
        "[sampled from the source model]",
        metavar="TEXT",
    )
    calibration_tokens: int = _option("Tokens to calibrate on.", 16384, metavar="N")
    seed: int = _option("Seed of sampling and regression.", 0, metavar="N")
    refine: bool = _option(
        "Regress each layer on the source's outputs after the closed form: minutes, much better.", False
    )
    refine_steps: int | None = _option("With --refine: steps for each layer. [200]", metavar="N")
    refine_minutes: float | None = _option(
        "With --refine: stop starting layers' regressions after this time.", metavar="M"
    )
    qk_norm: str = _option(
        "Keys behind a norm (Qwen3, OLMo 2, Gemma 3): exact, computed by the source's own projections and norm before they "
        "become latents; or regression, linear keys in their place, for a plain kv_a projection.",
        "exact",
        choices=QK_NORMS,
    )
    work_dir: str | None = _option(
        "Keep calibration results here, and continue from them after an interruption.", metavar="DIR"
    )
    layers: str | None = _option("Layers to convert, as 0-3,7; the others keep their attention. [all]", metavar="LIST")
    dtype: str | None = _option("Store weights in this dtype. [the source's]", choices=DTYPES)
    device: str = _option("Device for the decompositions: cpu, cuda, cuda:1, ...", "cpu", metavar="DEVICE")
    max_shard_size: str = _option("Largest weight file, e.g. 5GB or 500MB.", "5GB", metavar="SIZE")
    revision: str | None = _option("Branch, tag or commit, when IN is a hub id.", metavar="REV")
    overwrite: bool = _option("Replace OUT if it exists.", False)
    verify: bool = _option("Check a few layers against the source's attention, and report the error of each.", False)

    def __post_init__(self) -> None:
        _require(self.init in INITS, "--init", f"one of {', '.join(INITS)}", self.init)
        _require(self.qk_norm in QK_NORMS, "--qk-norm", f"one of {', '.join(QK_NORMS)}", self.qk_norm)
        _require(self.dtype is None or self.dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        for flag, value in (("--rank", self.rank), ("--nope-dim", self.nope_dim), ("--q-rank", self.q_rank)):
            least = 0 if flag == "--nope-dim" else 1
            _require(value is None or value >= least, flag, f"a whole number of at least {least}", value)
        rope = self.rope_dim
        _require(rope is None or (rope >= 2 and rope % 2 == 0), "--rope-dim", "an even number of at least 2", rope)
        _require(self.energy is None or 0 < self.energy <= 1, "--energy", "a share in (0, 1]", self.energy)
        self._check_rank_policy()
        self._check_calibration()
        parse_size(self.max_shard_size)
        if self.kv_size is not None:
            parse_share(self.kv_size)
        if self.layers is not None:
            parse_layers(self.layers)

    @property
    def has_budget(self) -> bool:
        """Whether the widths are chosen to meet a KV budget."""
        return self.kv_size is not None or self.kv_bytes_per_token is not None

    def _check_rank_policy(self) -> None:
        given = [flag for flag, value in self._rank_policies().items() if value is not None]
        if not given:
            raise OptionError(
                "no KV size was given: add --kv-size 25%, --rank 128, or another of --energy, --kv-bytes-per-token."
            )
        if self.fixed_ends and set(given) != {"--rank", "--energy"}:
            raise OptionError(
                "--fixed-ends needs both --energy (for the inner layers) and --rank (for the first and last)."
            )
        if len(given) > 1 and not self.fixed_ends:
            raise OptionError(f"{' and '.join(given)} all set the rank: give one of them.")
        if self.has_budget and self.rope_dim is not None:
            raise OptionError(
                "--rope-dim: a KV size chooses the rotary width itself; give --rank with it, or leave it out."
            )
        if self.rank_multiple is not None and (self.rank_multiple < 2 or self.rank_multiple % 2 or not self.has_budget):
            raise OptionError(
                "--rank-multiple: expected an even number of at least 2, together with --kv-size; change the value."
            )

    @property
    def has_latent_norm(self) -> bool:
        """Whether the latents get a norm."""
        return self.latent_norm or self.portable

    def _rank_policies(self) -> dict[str, object]:
        names = ("rank", "energy", "kv_size", "kv_bytes_per_token")
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}

    def _check_calibration(self) -> None:
        _require(
            self.calibration_tokens >= 1, "--calibration-tokens", "a positive whole number", self.calibration_tokens
        )
        for flag, value in (("--refine-steps", self.refine_steps), ("--refine-minutes", self.refine_minutes)):
            _require(value is None or value > 0, flag, "a positive number", value)
            if value is not None and not self.refine:
                raise OptionError(f"{flag}: only with --refine; add it, or leave {flag} out.")
        positive = self.kv_bytes_per_token is None or self.kv_bytes_per_token > 0
        _require(positive, "--kv-bytes-per-token", "a positive whole number", self.kv_bytes_per_token)
        if self.init == "paper":
            calibrated_only: dict[str, object] = {
                "--kv-size": self.kv_size,
                "--kv-bytes-per-token": self.kv_bytes_per_token,
            }
            calibrated_only |= {"--calibration": self.calibration, "--refine": self.refine or None}
            for flag, given in calibrated_only.items():
                if given is not None:
                    raise OptionError(
                        f"{flag}: not with --init paper, which looks at weights alone; leave one of them out."
                    )
        elif self.nope_dim is not None:
            raise OptionError(
                "--nope-dim: only with --init paper; the calibrated initialisation keeps whole un-rotated queries."
            )

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


def parse_share(text: str) -> float:
    """Share in a text such as 25% or 0.25. Raises `OptionError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise OptionError(
            f"--kv-size: expected a share such as 25% or 0.25, at most 100%, found {text!r}; change the value."
        )
    return share


def parse_layers(text: str) -> tuple[int, ...]:
    """Sorted layer numbers of a list such as 0-3,7. Raises `OptionError`."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers: expected a list such as 0-3,7, found {text!r}; change the value.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))
