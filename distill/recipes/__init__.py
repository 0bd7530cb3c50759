"""Recipes: YAML files with options of a healing run; those of the published runs come with the package.

A recipe holds any options of xeco-distill (`healing`), how the student is made (`convert`, for xeco-convert), and the shape of
the models, from which --dry-run says memory and time before anything is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.errors import OptionError, first_line

from ..options import DistillOptions, checked_mapping

_FOLDER = Path(__file__).parent
_KEYS = {"about", "source", "convert", "shape", "healing"}
_SHAPE = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tied",
    "teacher_parameters",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A YAML file: `options` for the healing run, and what it says about models."""

    name: str
    options: Mapping[str, Any]
    about: str = ""
    source: str | None = None
    convert: Mapping[str, Any] | None = None
    shape: Mapping[str, Any] | None = None

    def dry_run(self, options: DistillOptions) -> list[str]:
        """Commands, memory and time, from the shape alone."""
        import torch

        from ..plan import describe_estimate, estimate, measured_flops

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        length = options.seq_length or 1024
        sizes = estimate(self.sizes(), options, length, world=1, flops=measured_flops(device))
        flags = " ".join(
            f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
            for key, value in (self.convert or {}).items()
        )
        return [
            f"{self.name}: {self.about}",
            f"make the student: xeco-convert {self.source} OUT {flags}",
            f"heal it: xeco-distill OUT --config {self.name}",
            f"stages {', '.join(options.stage_list)}; {options.tokens:,} tokens in rows of {length}; {sizes.trained:,} of "
            f"{sizes.parameters:,} parameters trained",
            *describe_estimate(sizes, device, 1),
        ]

    def sizes(self) -> Any:
        """Numbers stored in student and teacher."""
        from ..plan import Sizes

        if self.shape is None or self.convert is None:
            raise OptionError(f"{self.name}: a dry run without OUT needs `shape` and `convert` in the recipe.")
        s = dict(self.shape)
        hidden, heads, dim, layers = s["hidden_size"], s["num_attention_heads"], s["head_dim"], s["num_hidden_layers"]
        rank, rope, q_rank = int(self.convert["rank"]), int(self.convert["rope_dim"]), self.convert.get("q_rank")
        nope = dim - rope if self.convert.get("init") == "paper" else dim
        width = heads * (nope + rope)
        queries = hidden * width if q_rank is None else q_rank * (hidden + width)
        attention = queries + hidden * (rank + rope) + rank * heads * (nope + dim) + heads * dim * hidden
        embedding = s["vocab_size"] * hidden * (1 if s["tied"] else 2)
        norms = (2 * layers + 1) * hidden
        parameters = layers * (attention + 3 * hidden * s["intermediate_size"]) + norms + embedding
        return Sizes(
            parameters=parameters,
            attention=layers * attention,
            norms=norms,
            teacher=s["teacher_parameters"],
            teacher_bytes=2 * s["teacher_parameters"],
            hidden_size=hidden,
            num_layers=layers,
            vocab_size=s["vocab_size"],
        )


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_config(name: str) -> Recipe:
    """A recipe by file or by name. Raises `OptionError` for what is no recipe."""
    path = Path(name) if Path(name).is_file() else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise OptionError(
            f"--config: {name}: expected a YAML file or the name of a recipe, found neither; recipes: "
            f"{', '.join(recipe_names())}."
        )
    data = _read(path)
    if not set(data) & _KEYS:  # a plain file of options
        return Recipe(name=name, options=checked_mapping(data, str(path)))
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise OptionError(f"{path}: unknown keys {', '.join(unknown)}; expected {', '.join(sorted(_KEYS))}.")
    shape = data.get("shape")
    if shape is not None and set(shape) != _SHAPE:
        raise OptionError(f"{path}: shape: expected the keys {', '.join(sorted(_SHAPE))}.")
    return Recipe(
        name=name,
        about=str(data.get("about", "")).strip(),
        source=data.get("source"),
        convert=data.get("convert"),
        shape=shape,
        options=checked_mapping(data.get("healing") or {}, str(path)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise OptionError("--config needs PyYAML: pip install 'xeco-convert[distill]'.") from None
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config: {path}: not a YAML file ({first_line(error)}).") from None
    if not isinstance(data, dict):
        raise OptionError(f"--config: {path}: expected a YAML mapping of options, found {type(data).__name__}.")
    return data
