"""What a stock format is: where everything of a converted model goes in it. Imported for --help: torch only where it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from xeco_convert.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from xeco_convert.checkpoint import TensorHeader
    from xeco_convert.export.engines import Engine
    from xeco_convert.families import FamilySpec
    from xeco_convert.modeling import MlaLayer

Read = Callable[[str], "Tensor"]


class StockLayout(Protocol):
    """What is known before a weight is read. `cache_width`: numbers that the exported model caches per token and layer;
    `widths`: kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim of every layer."""

    @property
    def family(self) -> FamilySpec: ...
    @property
    def layers(self) -> Sequence[MlaLayer]: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def cache_width(self) -> int: ...
    @property
    def widths(self) -> dict[str, int]: ...


class ExportFormat(ABC):
    """One format. `about` follows its name in the help. `transformers_fields`: what transformers reads in fields that an engine
    may want otherwise. `card`: the README.md of the output below its metadata, with {source}, {version} and {engine}."""

    name: ClassVar[str]
    order: ClassVar[int] = 100
    about: ClassVar[str]
    transformers_fields: ClassVar[Mapping[str, Any]] = {}
    card: ClassVar[str]

    @abstractmethod
    def layout(
        self, config: Mapping[str, Any], family: FamilySpec, engine: Engine, stored: Collection[str]
    ) -> StockLayout:
        """Check a converted configuration, as transformers resolved it, against an engine; `stored`: names of the tensors.
        Raises `UnsupportedModelError` with what would come out wrong."""

    @abstractmethod
    def config(self, layout: Any, dtype: str) -> dict[str, Any]:
        """config.json of the output; `dtype` as config.json names it."""

    @abstractmethod
    def headers(self, layout: Any, dtype: str) -> list[TensorHeader]:
        """Every tensor of the output, in the order of the layers; `dtype` in safetensors' words."""

    @abstractmethod
    def tensors(self, layout: Any, read: Read, norm_weight: Callable[[int], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, float32, one layer in memory at a time. `norm_weight(layer)`: of the latent norm [R]."""


FORMATS: Registry[type[ExportFormat]] = Registry("xeco_convert.export.formats")
