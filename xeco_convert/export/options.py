"""The options of an export: one field is one flag is one help line."""

from __future__ import annotations

from dataclasses import dataclass

from xeco_convert.export.engines import ENGINES
from xeco_convert.export.formats import FORMATS
from xeco_convert.options import parse_size
from xeco_convert.settings import option, require


def _about_formats() -> str:
    return "; ".join(f"{entry.name}, {entry.about}" for entry in FORMATS) + "."


def _about_engines() -> str:
    *names, last = ENGINES.names()
    return f"Choose widths that this engine takes: {', '.join(names)} or {last}."


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `xeco-convert export` does. Raises `OptionError` for a format or engine that there is not."""

    format: str = option(_about_formats, "deepseek-v3", metavar="FORMAT")
    target: str = option(_about_engines, "transformers", metavar="ENGINE")
    rank: int | None = option(
        "kv_lora_rank to export at, where the converted model has more: its best latent directions, by text that it writes "
        "itself. [as converted]",
        metavar="N",
    )
    seed: int = option("Seed of sampling, for --rank and where a norm has to be put in.", 0, metavar="N")
    max_shard_size: str = option("Largest weight file.", "5GB", metavar="SIZE")
    overwrite: bool = option("Replace DEST if it exists.", False)

    def __post_init__(self) -> None:
        FORMATS.find(self.format, "--format")
        engine = ENGINES.find(self.target, "--target")
        require(self.rank is None or self.rank >= 1, "--rank", "a whole number of at least 1", self.rank)
        if self.rank is not None:
            engine.check_rank(self.rank)
        parse_size(self.max_shard_size)
