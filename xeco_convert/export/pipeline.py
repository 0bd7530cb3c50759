"""The export on one screen: index -> layout -> latent norms -> write -> compare -> report."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xeco_convert import __version__
from xeco_convert.checkpoint import CheckpointIndex, CheckpointWriter, TensorReader
from xeco_convert.checkpoint.companions import companion_files
from xeco_convert.checkpoint.dtypes import CONFIG_NAMES, TORCH_DTYPES
from xeco_convert.checkpoint.format import EXPORT_REPORT_FILE
from xeco_convert.checkpoint.output import check_output
from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.export.comparison import Comparison, compare_with_stock
from xeco_convert.export.engines import ENGINES
from xeco_convert.export.formats import FORMATS, ExportFormat, StockLayout
from xeco_convert.export.latent_norm import LatentStep, attentions
from xeco_convert.export.options import ExportOptions
from xeco_convert.export.own_text import OwnText
from xeco_convert.export.smaller_rank import entries_at_rank, with_rank
from xeco_convert.families import WRAPPERS, FamilySpec, supported_model_types
from xeco_convert.initialisation import Progress
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX
from xeco_convert.options import parse_size
from xeco_convert.pretrained import load_causal_lm, read_config
from xeco_convert.tokenizer import prepared_companions

_SAMPLING_SHARE, _WRITTEN_SHARE = 0.2, 0.8  # of the work, when these are done


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how it compares. `norm_kl` (nats per token) and `norm_top1`: what putting a norm on the latents
    changed in the model's predictions, None where the checkpoint was converted with one. `rank_kl` and `rank_top1`: the same of
    a smaller rank, with the norms that it needed; None where all ranks stayed. `comparison` is of what then was exported."""

    format: str
    target: str
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_numbers_before: int
    kv_numbers_after: int
    norm_kl: float | None
    norm_top1: float | None
    rank_kl: float | None
    rank_top1: float | None
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return dataclasses.asdict(self)


def export_checkpoint(
    converted: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> ExportReport:
    """Write the converted checkpoint `converted` as a stock model to the folder `output`, and compare the two.

    Raises the errors of `xeco_convert.errors`, each with one sentence; then nothing is written.
    """
    options = options or ExportOptions()
    progress = on_progress or (lambda what, share: None)
    index = CheckpointIndex.open(converted)
    check_output(Path(output), index.folder, overwrite=options.overwrite)
    family = _family(index)
    values = read_config(index.config, index.folder / "config.json").to_dict()
    if options.rank is not None:
        values["mla_layers"] = entries_at_rank(values.get("mla_layers"), options.rank)
    stock = FORMATS.find(options.format, "--format")()
    layout = stock.layout(values, family, ENGINES.find(options.target, "--target"), index.headers)
    dtype = _stored_dtype(index, layout)
    with prepared_companions(index, stock.config(layout, CONFIG_NAMES[dtype]), stock=True) as companions:
        return _Export(options, stock, layout, index, dtype, progress).write(Path(output), companions)


class _Export:
    """One run: writes everything, compares it with the converted checkpoint, and puts it in its place."""

    def __init__(
        self,
        options: ExportOptions,
        stock: ExportFormat,
        layout: StockLayout,
        index: CheckpointIndex,
        dtype: str,
        on_progress: Progress,
    ) -> None:
        self._options, self._format, self._layout = options, stock, layout
        self._index, self._dtype, self._on_progress = index, dtype, on_progress

    def write(self, output: Path, companions: Path) -> ExportReport:
        """`companions`: a folder with config.json and what else goes beside the weights."""
        options, layout = self._options, self._layout
        self._on_progress("loading the model", 0.0)
        model = load_causal_lm(self._index.folder, torch.float32).eval()
        text = OwnText(
            self._index.folder,
            model.config,
            weights_bytes=sum(header.num_bytes for header in self._index.headers.values()),
            seed=options.seed,
            on_progress=lambda share: self._on_progress("sampling text for the latents", _SAMPLING_SHARE * share),
        )
        numbers_before = sum(model.config.kv_cache_numbers_per_token())
        step = with_rank(model, options.rank, text)
        changed = _changed_latents(step.model) if step.norm or step.rank else {}
        writer = CheckpointWriter(
            output,
            self._format.headers(layout, self._dtype),
            max_shard_bytes=parse_size(options.max_shard_size),
            overwrite=options.overwrite,
        )
        with writer:
            self._write_weights(writer, changed, step.model)
            self._write_companions(writer, companions)
            self._on_progress("comparing with transformers' own class", _WRITTEN_SHARE)
            writer.flush()
            fields = {name: self._format.transformers_fields[name] for name in layout.engine.config}
            comparison = compare_with_stock(step.model, writer.folder, self._dtype, fields)
            report = self._report(step, numbers_before, comparison)
            writer.write_text(EXPORT_REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
        self._on_progress("written", 1.0)
        return report

    @torch.no_grad()
    def _write_weights(self, writer: CheckpointWriter, changed: dict[str, torch.Tensor], model: Any) -> None:
        reader, headers = TensorReader(self._index), self._format.headers(self._layout, self._dtype)

        def read(name: str) -> torch.Tensor:
            return changed[name].detach() if name in changed else reader.read(name, dtype=torch.float32)

        def norm_weight(layer: int) -> torch.Tensor:
            norm = attentions(model)[layer].kv_a_layernorm
            assert norm is not None, "every layer has a norm by now"
            return norm.weight.detach().float()

        for done, (name, tensor) in enumerate(self._format.tensors(self._layout, read, norm_weight)):
            writer.write(name, [tensor.to(TORCH_DTYPES[self._dtype])])
            share = done / len(headers)
            self._on_progress(f"writing {name}", _SAMPLING_SHARE + (_WRITTEN_SHARE - _SAMPLING_SHARE) * share)

    def _write_companions(self, writer: CheckpointWriter, companions: Path) -> None:
        for relative in [*companion_files(companions), Path("config.json")]:
            writer.copy_file(companions / relative, relative)
        card = self._format.card.format(
            source=self._index.folder.name, engine=self._layout.engine.name, version=__version__
        )
        writer.write_text("README.md", _CARD_METADATA + card)

    def _report(self, step: LatentStep, numbers_before: int, comparison: Comparison) -> ExportReport:
        layout = self._layout
        return ExportReport(
            format=self._options.format,
            target=self._options.target,
            **layout.widths,
            kv_numbers_before=numbers_before,
            kv_numbers_after=layout.cache_width * len(layout.layers),
            norm_kl=None if step.norm is None else step.norm.kl,
            norm_top1=None if step.norm is None else step.norm.top1,
            rank_kl=None if step.rank is None else step.rank.kl,
            rank_top1=None if step.rank is None else step.rank.top1,
            comparison=comparison,
        )


def _family(index: CheckpointIndex) -> FamilySpec:
    """The family of the source that was converted."""
    model_type = str(index.config.get("model_type"))
    if model_type.removeprefix(MODEL_TYPE_PREFIX) in WRAPPERS:
        raise UnsupportedModelError(
            f"{index.folder}: a {model_type} model is one of text and images, for which there is no stock class; serve the "
            "converted folder itself with trust_remote_code, or convert and export its text model alone (docs/faq.md)."
        )
    family = supported_model_types().get(model_type.removeprefix(MODEL_TYPE_PREFIX))
    if not model_type.startswith(MODEL_TYPE_PREFIX) or family is None:
        raise CheckpointError(
            f"{index.folder}: expected a checkpoint converted by xeco-convert, found model_type {model_type!r}; convert it first."
        )
    return family


def _stored_dtype(index: CheckpointIndex, layout: StockLayout) -> str:
    name = f"{layout.family.module_name(0)}.o_proj.weight"
    if name not in index.headers:
        raise CheckpointError(f"{index.folder}: {name} is missing; the weights do not belong to this config.json.")
    return index.headers[name].dtype


def _changed_latents(model: Any) -> dict[str, torch.Tensor]:
    """Weights that another latent changed, by name."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"))
    }


_CARD_METADATA = """---
library_name: transformers
tags:
- mla
- xeco-convert
---
"""
