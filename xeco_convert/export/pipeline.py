"""The export on one screen: index -> layout -> latent norms -> write -> compare -> report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
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
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError
from xeco_convert.export.comparison import Comparison, compare_with_stock
from xeco_convert.export.latent_norm import attentions, with_latent_norms
from xeco_convert.export.layout import ExportLayout, make_layout, stock_config
from xeco_convert.export.targets import TARGETS
from xeco_convert.export.tensors import stock_headers, stock_tensors
from xeco_convert.families import WRAPPERS, FamilySpec, supported_model_types
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX
from xeco_convert.options import parse_size
from xeco_convert.pretrained import load_causal_lm, read_config
from xeco_convert.tokenizer import prepared_companions

FORMATS = ("deepseek-v3",)
Progress = Callable[[str, float], None]
_SAMPLING_SHARE, _WRITTEN_SHARE = 0.2, 0.8  # of the work, when these are done


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `xeco-convert export` does. Raises `OptionError` for a format or target that there is not."""

    format: str = "deepseek-v3"
    target: str = "transformers"
    max_shard_size: str = "5GB"
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise OptionError(f"--format: expected one of {', '.join(FORMATS)}, found {self.format}; change the value.")
        if self.target not in TARGETS:
            raise OptionError(f"--target: expected one of {', '.join(TARGETS)}, found {self.target}; change the value.")
        parse_size(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how it compares. `norm_kl` (nats per token) and `norm_top1`: what putting a norm on the latents
    changed in the model's predictions, None where the checkpoint was converted with one."""

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
    """Write the converted checkpoint `converted` as stock DeepSeek-V3 to the folder `output`, and compare the two.

    Raises the errors of `xeco_convert.errors`, each with one sentence; then nothing is written.
    """
    options = options or ExportOptions()
    progress = on_progress or (lambda what, share: None)
    index = CheckpointIndex.open(converted)
    check_output(Path(output), index.folder, overwrite=options.overwrite)
    family = _family(index)
    values = read_config(index.config, index.folder / "config.json").to_dict()
    layout = make_layout(values, family, TARGETS[options.target], index.headers)
    dtype = _stored_dtype(index, layout)
    config = stock_config(layout, CONFIG_NAMES[dtype])
    with prepared_companions(index, config, stock=True) as companions:
        return _write(Path(output), options, index, layout, dtype, companions, progress)


def _write(
    output: Path,
    options: ExportOptions,
    index: CheckpointIndex,
    layout: ExportLayout,
    dtype: str,
    companions: Path,
    progress: Progress,
) -> ExportReport:
    """Write everything, compare it with the converted checkpoint, and put it in its place."""
    progress("loading the model", 0.0)
    model = load_causal_lm(index.folder, torch.float32).eval()
    weights_bytes = sum(header.num_bytes for header in index.headers.values())
    step = with_latent_norms(
        *(model, index.folder),
        weights_bytes=weights_bytes,
        seed=options.seed,
        on_progress=lambda share: progress("sampling text for the latent norms", _SAMPLING_SHARE * share),
    )
    state = _replaced(step.model) if step.fidelity is not None else {}
    writer = CheckpointWriter(
        output,
        stock_headers(layout, dtype),
        max_shard_bytes=parse_size(options.max_shard_size),
        overwrite=options.overwrite,
    )
    with writer:
        _write_weights(writer, layout, index, dtype, state, step.model, progress)
        _write_companions(writer, layout, index, companions)
        progress("comparing with transformers' own class", _WRITTEN_SHARE)
        writer.flush()
        comparison = compare_with_stock(step.model, writer.folder, dtype, _overrides(layout))
        report = _report(options, layout, step.fidelity, comparison)
        writer.write_text(EXPORT_REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    progress("written", 1.0)
    return report


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


def _stored_dtype(index: CheckpointIndex, layout: ExportLayout) -> str:
    name = f"{layout.family.module_name(0)}.o_proj.weight"
    if name not in index.headers:
        raise CheckpointError(f"{index.folder}: {name} is missing; the weights do not belong to this config.json.")
    return index.headers[name].dtype


def _replaced(model: Any) -> dict[str, torch.Tensor]:
    """Weights that putting norms in place changed, by name."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(("kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight"))
    }


def _write_weights(
    writer: CheckpointWriter,
    layout: ExportLayout,
    index: CheckpointIndex,
    dtype: str,
    state: dict[str, torch.Tensor],
    model: Any,
    progress: Progress,
) -> None:
    reader = TensorReader(index)

    def read(name: str) -> torch.Tensor:
        return state[name].detach() if name in state else reader.read(name, dtype=torch.float32)

    def norm_weight(layer: int) -> torch.Tensor:
        norm = attentions(model)[layer].kv_a_layernorm
        assert norm is not None
        return norm.weight.detach().float()

    count = 10 * len(layout.layers) + 3
    with torch.no_grad():
        for done, (name, tensor) in enumerate(stock_tensors(layout, read, norm_weight)):
            writer.write(name, [tensor.to(TORCH_DTYPES[dtype])])
            progress(f"writing {name}", _SAMPLING_SHARE + (_WRITTEN_SHARE - _SAMPLING_SHARE) * done / count)


def _write_companions(writer: CheckpointWriter, layout: ExportLayout, index: CheckpointIndex, companions: Path) -> None:
    for relative in [*companion_files(companions), Path("config.json")]:
        writer.copy_file(companions / relative, relative)
    writer.write_text(
        "README.md", _CARD.format(source=index.folder.name, target=layout.target.name, version=__version__)
    )


def _overrides(layout: ExportLayout) -> dict[str, Any]:
    """Fields that a target wants otherwise than transformers, as transformers reads them."""
    stock = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}
    return {name: stock[name] for name in layout.target.config}


def _report(options: ExportOptions, layout: ExportLayout, fidelity: Any, comparison: Comparison) -> ExportReport:
    return ExportReport(
        format=options.format,
        target=options.target,
        kv_lora_rank=layout.rank,
        qk_nope_head_dim=layout.heads.nope,
        qk_rope_head_dim=layout.heads.rope,
        v_head_dim=layout.heads.v,
        kv_numbers_before=sum(layer.cache_width for layer in layout.layers),
        kv_numbers_after=layout.cache_width * len(layout.layers),
        norm_kl=None if fidelity is None else fidelity.kl,
        norm_top1=None if fidelity is None else fidelity.top1,
        comparison=comparison,
    )


_CARD = """---
library_name: transformers
tags:
- mla
- xeco-convert
---

# {source} as stock DeepSeek-V3

A dense model of the DeepSeek-V3 architecture (no experts are in use), exported by xeco-convert {version} for {target}. It
loads without remote code: `AutoModelForCausalLM.from_pretrained(folder)`. How it compares with the converted model is in
`xeco_export.json`.
"""
