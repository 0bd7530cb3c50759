"""The pipeline: index -> plan -> check -> ranks -> layers -> write -> verify -> report.

One layer's weights are in memory at a time; everything else is copied in pieces.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xeco_convert import __version__
from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex, CheckpointWriter, TensorHeader, TensorReader
from xeco_convert.checkpoint.companions import companion_files
from xeco_convert.checkpoint.dtypes import TORCH_DTYPES
from xeco_convert.checkpoint.format import FORMAT_VERSION, PAGE_FILE, REPORT_FILE
from xeco_convert.checkpoint.output import check_output
from xeco_convert.checkpoint.reader import all_finite
from xeco_convert.errors import OptionError, first_line
from xeco_convert.families import FamilySpec
from xeco_convert.initialisation import ConvertedLayer, Progress
from xeco_convert.memory import peak_bytes
from xeco_convert.model_card import model_card
from xeco_convert.modeling import code_files
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX, MULTIMODAL, auto_map, multimodal_auto_map
from xeco_convert.modeling.layer_xeco import MlaShape
from xeco_convert.options import ConvertOptions, parse_size
from xeco_convert.plan import ConversionPlan, PlannedLayer, make_plan, num_parameters
from xeco_convert.pretrained import without_empty_settings
from xeco_convert.report import ConversionReport, LayerReport
from xeco_convert.report_page import report_page
from xeco_convert.tokenizer import prepared_companions
from xeco_convert.verify import LayerChecker, check_path_to_logits, sampled_layers

_COPY_SHARE = 0.1  # of the progress bar


def convert(
    source: str | Path,
    output: str | Path,
    options: ConvertOptions | None = None,
    *,
    on_progress: Progress | None = None,
    **fields: Any,
) -> ConversionReport:
    """Convert the checkpoint `source` (folder or hub id) to MLA and write it to the folder `output`.

    Options are given as `ConvertOptions` or as its fields: `convert("in", "out", rank=128)`. `on_progress` is called with
    (what, share done). Raises the errors of `xeco_convert.errors`, each with one sentence; then nothing is written.
    """
    started = time.monotonic()
    if options is not None and fields:
        raise OptionError(
            f"convert: give options either as an object or as fields, not both (found {', '.join(fields)})."
        )
    options = options if options is not None else ConvertOptions(**fields)
    report = convert_as_planned(plan_conversion(source, output, options), output, on_progress=on_progress)
    return dataclasses.replace(report, source=str(source), seconds=time.monotonic() - started)


def plan_conversion(source: str | Path, output: str | Path | None, options: ConvertOptions) -> ConversionPlan:
    """What `convert` would do, from headers alone; with `output`, whether that folder can be written. Raises as `convert`."""
    index = CheckpointIndex.open(source, options.revision)
    if output is not None:
        check_output(Path(output), index.folder, overwrite=options.overwrite)
    return make_plan(index, options)


def convert_as_planned(
    plan: ConversionPlan, output: str | Path, *, on_progress: Progress | None = None
) -> ConversionReport:
    """Do what the plan says and write the folder `output`; the rest as for `convert`."""
    started, index = time.monotonic(), plan.source.index
    device = device_by_name(plan.options.device)
    shapes = {item.layer: item.shape for item in plan.converted}
    # widths may still change, by which no tokenizer is chosen
    with prepared_companions(index, output_config(plan, shapes)) as companions:
        report = _Conversion(plan, device, on_progress or (lambda what, share: None), companions).write(Path(output))
    return dataclasses.replace(
        report,
        source=index.hub_id or str(index.folder),
        output=str(output),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_bytes(),
    )


class _Conversion:
    """One run over a plan: takes each layer from the initialisation, writes it, keeps its widths and report.

    `companions`: a folder with the files of the source that are written beside the weights."""

    def __init__(self, plan: ConversionPlan, device: torch.device, on_progress: Progress, companions: Path) -> None:
        self._plan = plan
        self._reader = TensorReader(plan.source.index)
        self._device = device
        self._on_progress = on_progress
        self._companions = companions
        # what came out, by layer
        self._shapes: dict[int, MlaShape] = {}
        self._layer_reports: dict[int, LayerReport] = {}

    def write(self, output: Path) -> ConversionReport:
        """Do it, and give the report without what depends on the machine."""
        options = self._plan.options
        maker = options.initialisation.begin(self._plan, self._device, self._layer_progress)
        self._plan = self._plan.with_widths_of(maker)
        checker = LayerChecker(self._plan.source) if options.verify else None
        checked = sampled_layers([item.layer for item in self._plan.converted])
        checks: dict[int, tuple[float, float]] = {}
        headers = self._plan.output_headers()
        writer = CheckpointWriter(
            output, headers, max_shard_bytes=parse_size(options.max_shard_size), overwrite=options.overwrite
        )
        with writer:
            planned = {item.layer: item for item in self._plan.converted}
            for layer in maker.layers(self._plan):
                self._write_layer(planned[layer.layer], layer, writer)
                if checker is not None and layer.layer in checked:
                    checks[layer.layer] = checker.check(
                        layer.layer, layer.source, layer.factors, self._shapes[layer.layer]
                    )
            self._copy_rest(writer)
            self._write_companions(writer)
            report = self._report(headers, maker.summary()).with_checks(checks)
            if options.verify:
                self._on_progress("verifying", 1.0)
                writer.flush()
                report = dataclasses.replace(report, path_error=check_path_to_logits(self._plan, writer.folder))
            self._write_report(writer, report)
        return dataclasses.replace(report, timings=maker.timings())

    def _layer_progress(self, what: str, share: float) -> None:
        self._on_progress(what, (1 - _COPY_SHARE) * share)

    def _write_layer(self, planned: PlannedLayer, layer: ConvertedLayer, writer: CheckpointWriter) -> None:
        # what comes out of the conversion alone; bit planes take as many bytes as the plan has counted
        factors = layer.factors
        shape = dataclasses.replace(planned.shape, rope_index=factors.rope_index, latent_bits=factors.latent_bits)
        tensors, module = factors.state_dict(), self._plan.source.family.module_name(layer.layer)
        for header in self._plan.converted_headers(planned):
            writer.write(header.name, [self._cast(tensors[header.name.removeprefix(f"{module}.")], header)])
        before = self._plan.source_kv_numbers_per_token()[layer.layer]
        self._shapes[layer.layer] = shape
        self._layer_reports[layer.layer] = LayerReport(
            layer=layer.layer,
            kv_lora_rank=shape.kv_lora_rank,
            qk_rope_head_dim=shape.qk_rope_head_dim,
            key_error=layer.errors.key,
            value_error=layer.errors.value,
            kv_numbers_before=before,
            kv_numbers_after=shape.cache_width,
            kv_bytes_after=shape.cache_bytes(DTYPE_BYTES[self._plan.dtype]),
            latent_bits=shape.latent_bits,
            rope_bits=shape.rope_bits,
            bits=shape.bits_in_words if shape.is_packed else None,
            details=layer.details,
        )

    def _copy_rest(self, writer: CheckpointWriter) -> None:
        """Everything that is not converted, piece by piece, in the dtype of the output."""
        total, done = sum(header.num_bytes for header in self._plan.copied), 0
        for header in self._plan.copied:
            self._on_progress(f"writing {header.name}", 1 - _COPY_SHARE * (1 - done / total))
            writer.write(header.name, (self._cast(chunk, header) for chunk in self._reader.read_chunks(header.name)))
            done += header.num_bytes
        self._on_progress("written", 1.0)

    def _cast(self, tensor: torch.Tensor, header: TensorHeader) -> torch.Tensor:
        cast = tensor.to(dtype=TORCH_DTYPES[header.dtype], device="cpu")
        if not all_finite(cast):
            raise OptionError(
                f"--dtype: {header.name} does not fit into {header.dtype} (values up to {tensor.abs().max():.3g}); "
                "choose bfloat16 or float32."
            )
        return cast

    def _report(self, headers: list[TensorHeader], summary: dict[str, Any]) -> ConversionReport:
        plan = self._plan
        numbers = plan.source_kv_numbers_per_token()
        size = DTYPE_BYTES[plan.dtype]
        layers = self._layer_reports | {item.layer: _kept(item.layer, numbers[item.layer], size) for item in plan.kept}
        return ConversionReport(
            source="",
            output="",
            init=plan.options.init,
            model_type=f"{MODEL_TYPE_PREFIX}{plan.source.model_type}",
            dtype=plan.dtype,
            layers=tuple(layers[number] for number in sorted(layers)),
            kv_bytes_per_number=size,
            parameters_before=num_parameters(list(plan.source.index.headers.values())),
            parameters_after=num_parameters(headers),
            dropped=plan.dropped,
            summary={**summary, **_exact_keys(plan)},
        )

    def _write_companions(self, writer: CheckpointWriter) -> None:
        """What the weights are loaded with: configuration, code, tokenizer and licences of the source."""
        for relative in companion_files(self._companions):
            writer.copy_file(self._companions / relative, relative)
        for name, file in code_files().items():
            writer.copy_file(file, Path(name))
        writer.write_text("config.json", json.dumps(output_config(self._plan, self._shapes), indent=2) + "\n")

    def _write_report(self, writer: CheckpointWriter, report: ConversionReport) -> None:
        """What was done: report, page, model card."""
        index = self._plan.source.index
        writer.write_text(REPORT_FILE, json.dumps(report.reproducible(), indent=2) + "\n")
        named = dataclasses.replace(report, source=index.hub_id or index.folder.name)
        writer.write_text(PAGE_FILE, report_page(named))
        writer.write_text("README.md", model_card(self._plan, report))


def _kept(layer: int, kv_numbers: int, number_bytes: int) -> LayerReport:
    return LayerReport(
        layer=layer,
        kv_lora_rank=None,
        qk_rope_head_dim=None,
        key_error=None,
        value_error=None,
        kv_numbers_before=kv_numbers,
        kv_numbers_after=kv_numbers,
        kv_bytes_after=kv_numbers * number_bytes,
    )


def _exact_keys(plan: ConversionPlan) -> dict[str, Any]:
    """What exact keys behind a norm cost, for the report; nothing where there are none."""
    parameters, products = plan.exact_key_cost()
    return {"exact_keys": {"parameters": parameters, "multiplications_per_token": products}} if parameters else {}


def output_config(plan: ConversionPlan, shapes: Mapping[int, MlaShape]) -> dict[str, Any]:
    """config.json of the output: the source's own, with an honest model_type and the widths of every converted layer."""
    source, index, options = plan.source, plan.source.index, plan.options
    config = _with_dtype(without_empty_settings(index.config), options.dtype)
    config.pop("_name_or_path", None)
    recorded = [name for name, item in options.fields().items() if item.metadata["recorded"]]
    values = options.values()
    return {
        **config,
        **(_text_model(plan, shapes) if source.wrapper is None else _whole_model(plan, shapes, source.wrapper)),
        "conversion": {
            "format_version": FORMAT_VERSION,
            "tool": f"xeco-convert {__version__}",
            "source": {
                "model_type": source.model_type,
                "path": index.hub_id or str(index.folder),
                "revision": index.revision,
            },
            "options": {name: values[name] for name in recorded if values[name] not in (None, False)},
        },
    }


def model_identity(family: FamilySpec) -> dict[str, Any]:
    """The entries of config.json by which transformers finds the classes of a converted family."""
    return {
        "model_type": f"{MODEL_TYPE_PREFIX}{family.model_type}",
        "architectures": [f"Xeco{family.class_prefix}ForCausalLM"],
        "auto_map": auto_map(family.class_prefix),
    }


def wrapper_identity(model_type: str, prefix: str) -> dict[str, Any]:
    """The same of a model around a text model: `model_type` of the source, and how transformers' classes of it begin."""
    return {
        "model_type": f"{MODEL_TYPE_PREFIX}{model_type}",
        "architectures": [f"Xeco{prefix}{MULTIMODAL}ForConditionalGeneration"],
        "auto_map": multimodal_auto_map(prefix),
    }


def _text_model(plan: ConversionPlan, shapes: Mapping[int, MlaShape]) -> dict[str, Any]:
    """What config.json of a converted text model says of its own."""
    layers = range(plan.source.geometry.num_hidden_layers)
    entries = [shapes[layer].to_dict() if layer in shapes else None for layer in layers]
    return {**model_identity(plan.source.family), "mla_layers": entries}


def _whole_model(plan: ConversionPlan, shapes: Mapping[int, MlaShape], prefix: str) -> dict[str, Any]:
    """The same of a model around it; the text model's fields as transformers resolved them, since the wrapper's defaults for
    what its file leaves out may be others than those of the text model's own class."""
    text = {**plan.source.values, **_text_model(plan, shapes)}
    return {
        **wrapper_identity(plan.source.model_type, prefix),
        "text_config": _with_dtype(text, plan.options.dtype),
    }


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A configuration, and those of its parts, that says in which dtype all weights are written."""
    if dtype is None:
        return config
    parts = {name: _with_dtype(value, dtype) for name, value in config.items() if _has_dtype(value)}
    return {**{name: value for name, value in config.items() if name != "torch_dtype"}, **parts, "dtype": dtype}


def _has_dtype(value: Any) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("dtype", "torch_dtype"))


def device_by_name(name: str) -> torch.device:
    """The device by name. Raises `OptionError` where torch does not know or have it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise OptionError(
            f"--device: {name!r} cannot be used here ({reason}); choose cpu, or cuda where a GPU is present."
        ) from None
    return device
