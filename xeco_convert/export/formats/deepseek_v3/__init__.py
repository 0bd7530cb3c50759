"""Stock DeepSeek-V3, dense: latent attention in every layer, no experts in use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from xeco_convert.export.formats.format import FORMATS, ExportFormat, Read

if TYPE_CHECKING:
    from torch import Tensor

    from xeco_convert.checkpoint import TensorHeader
    from xeco_convert.export.engines import Engine
    from xeco_convert.export.formats.deepseek_v3.layout import ExportLayout
    from xeco_convert.families import FamilySpec


@FORMATS.add
class DeepseekV3(ExportFormat):
    """Classes of this model_type are in transformers, vLLM, SGLang, llama.cpp and mlx-lm."""

    name = "deepseek-v3"
    order = 0
    about = "dense"
    # what an engine may want otherwise, as transformers reads it
    transformers_fields: ClassVar[Mapping[str, Any]] = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}
    card = """
# {source} as stock DeepSeek-V3

A dense model of the DeepSeek-V3 architecture (no experts are in use), exported by xeco-convert {version} for {engine}. It
loads without remote code: `AutoModelForCausalLM.from_pretrained(folder)`. How it compares with the converted model is in
`xeco_export.json`.
"""

    def layout(
        self, config: Mapping[str, Any], family: FamilySpec, engine: Engine, stored: Collection[str]
    ) -> ExportLayout:
        from xeco_convert.export.formats.deepseek_v3.layout import make_layout

        return make_layout(config, family, engine, stored)

    def config(self, layout: ExportLayout, dtype: str) -> dict[str, Any]:
        from xeco_convert.export.formats.deepseek_v3.config import stock_config

        return stock_config(layout, dtype)

    def headers(self, layout: ExportLayout, dtype: str) -> list[TensorHeader]:
        from xeco_convert.export.formats.deepseek_v3.tensors import stock_headers

        return stock_headers(layout, dtype)

    def tensors(
        self, layout: ExportLayout, read: Read, norm_weight: Callable[[int], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        from xeco_convert.export.formats.deepseek_v3.tensors import stock_tensors

        return stock_tensors(layout, read, norm_weight)
