"""The pipeline: index -> plan -> check -> ranks -> layers -> write -> verify -> report.

One layer's weights are in memory at a time; everything else is copied in pieces.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from xeco_convert import __version__
from xeco_convert.checkpoint import DTYPE_BYTES, CheckpointIndex, CheckpointWriter, TensorHeader, TensorReader
from xeco_convert.checkpoint.output import check_output
from xeco_convert.checkpoint.writer import DTYPE_NAMES
from xeco_convert.errors import OptionError
from xeco_convert.factorize import MlaAttention, MlaShape, SourceAttention
from xeco_convert.factorize.attention import LayerErrors
from xeco_convert.factorize.paper import paper_errors, paper_factors, paper_spectrum
from xeco_convert.model_card import model_card
from xeco_convert.modeling import MlaLayer, code_files
from xeco_convert.modeling.configuration_xeco import MODEL_TYPE_PREFIX, auto_map
from xeco_convert.options import ConvertOptions, parse_size
from xeco_convert.plan import ConversionPlan, make_plan, num_parameters
from xeco_convert.ranks import energy_ranks
from xeco_convert.report import ConversionReport, LayerReport
from xeco_convert.verify import LayerChecker, sampled_layers

FORMAT_VERSION = 1
REPORT_FILE = "xeco_report.json"
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# A layer's decomposition takes about as long as copying this many times its bytes (1B shape, 2 cores): for the ETA only.
_FACTORISE_COST = 30

Progress = Callable[[str, float, float], None]


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
    (what, done, total). Raises the errors of `xeco_convert.errors`, each with one sentence; then nothing is written.
    """
    started = time.monotonic()
    if options is not None and fields:
        raise OptionError(
            f"convert: give options either as an object or as fields, not both (found {', '.join(fields)})."
        )
    options = options if options is not None else ConvertOptions(**fields)
    device = _device(options.device)
    index = CheckpointIndex.open(source, options.revision)
    check_output(Path(output), index.folder, overwrite=options.overwrite)
    plan = make_plan(index, options)
    run = _Conversion(plan, device, on_progress or (lambda what, done, total: None))
    report = run.write(Path(output))
    return dataclasses.replace(
        report,
        source=str(source),
        output=str(output),
        seconds=time.monotonic() - started,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _Conversion:
    """One run over a plan: reads a layer, factorises it, writes it, forgets it."""

    def __init__(self, plan: ConversionPlan, device: torch.device, on_progress: Progress) -> None:
        self._plan = plan
        self._reader = TensorReader(plan.index)
        self._device = device
        self._on_progress = on_progress
        self._done = 0.0
        passes = 1 if plan.ranks_are_final else 2
        copied = sum(header.num_bytes for header in plan.copied)
        self._total = copied + passes * len(plan.converted_layers) * self._layer_cost
        self._layer_reports: dict[int, LayerReport] = {}

    @property
    def _layer_cost(self) -> float:
        layers = self._plan.converted_layers
        if not layers:
            return 0.0
        names = [f"{self._plan.projection(which, layers[0])}.weight" for which in ("k_proj", "v_proj")]
        return _FACTORISE_COST * sum(self._plan.index.headers[name].num_bytes for name in names)

    def write(self, output: Path) -> ConversionReport:
        """Do it, and give the report without what depends on the machine."""
        if not self._plan.ranks_are_final:
            self._plan = self._with_chosen_ranks()
        plan, options = self._plan, self._plan.options
        checker = LayerChecker(plan) if options.verify else None
        checked = sampled_layers(plan.converted_layers) if options.verify else ()
        checks: dict[int, tuple[float, float]] = {}
        headers = plan.output_headers()
        writer = CheckpointWriter(
            output, headers, max_shard_bytes=parse_size(options.max_shard_size), overwrite=options.overwrite
        )
        with writer:
            for layer in plan.converted_layers:
                source, factors = self._convert_layer(layer, writer)
                if checker is not None and layer in checked:
                    checks[layer] = checker.check(layer, source, factors)
            for header in plan.copied:
                writer.write(header.name, self._copied(header))
            report = self._report(headers).with_checks(checks)
            self._write_companions(writer, report)
        return report

    def _with_chosen_ranks(self) -> ConversionPlan:
        """First pass of a rank policy: the spectrum of every layer, then the ranks."""
        spectra = []
        for layer in self._plan.converted_layers:
            self._advance(f"spectrum of layer {layer}", 0)
            spectra.append(paper_spectrum(self._source_attention(layer)).cpu().numpy())
            self._advance(f"spectrum of layer {layer}", self._layer_cost)
        options = self._plan.options
        assert options.energy is not None
        ranks = energy_ranks(spectra, options.energy, ends=options.rank if options.fixed_ends else None)
        return self._plan.with_ranks(ranks)

    def _convert_layer(self, layer: int, writer: CheckpointWriter) -> tuple[SourceAttention, MlaAttention]:
        self._advance(f"layer {layer}", 0)
        shape = self._plan.layers[layer].shape
        assert shape is not None
        source = self._source_attention(layer)
        factors = paper_factors(source, shape)
        for header in self._plan.converted_headers(layer):
            tensor = factors.state_dict()[header.name.removeprefix(f"{self._plan.module_name(layer)}.")]
            writer.write(header.name, [self._cast(tensor, header)])
        self._layer_reports[layer] = self._layer_report(layer, shape, paper_errors(source, factors, shape))
        self._advance(f"layer {layer}", self._layer_cost)
        return source, factors

    def _source_attention(self, layer: int) -> SourceAttention:
        plan, geometry = self._plan, self._plan.geometry

        def read(name: str) -> torch.Tensor | None:
            if name not in plan.index.headers:
                return None
            return self._reader.read(name, dtype=torch.float32, device=self._device)

        tensors = {
            f"{which[0]}_{part}": read(f"{plan.projection(which, layer)}.{part}")
            for which in ("q_proj", "k_proj", "v_proj", "o_proj")
            for part in ("weight", "bias")
        }
        return SourceAttention(
            **tensors,  # type: ignore[arg-type]
            input_norm_weight=read(plan.family.input_norm.format(layer=layer)),  # type: ignore[arg-type]
            num_attention_heads=geometry.num_attention_heads,
            num_key_value_heads=geometry.num_key_value_heads,
            head_dim=geometry.head_dim,
        )

    def _copied(self, header: TensorHeader) -> Iterator[torch.Tensor]:
        """A source tensor as it is, in the dtype of the output, piece by piece."""
        for chunk in self._reader.read_chunks(header.name):
            yield self._cast(chunk, header)
            self._advance(header.name, chunk.nbytes)

    def _cast(self, tensor: torch.Tensor, header: TensorHeader) -> torch.Tensor:
        cast = tensor.to(dtype=_TORCH_DTYPES[header.dtype], device="cpu")
        if not bool(torch.isfinite(cast).all()):
            raise OptionError(
                f"--dtype: {header.name} does not fit into {header.dtype} (values up to {tensor.abs().max():.3g}); "
                "choose bfloat16 or float32."
            )
        return cast

    def _layer_report(self, layer: int, shape: MlaShape | None, errors: LayerErrors | None) -> LayerReport:
        kept = self._plan.geometry.cache_width
        return LayerReport(
            layer=layer,
            kv_lora_rank=shape.kv_lora_rank if shape else None,
            qk_rope_head_dim=shape.qk_rope_head_dim if shape else None,
            key_error=errors.key if errors else None,
            value_error=errors.value if errors else None,
            kv_numbers_before=kept,
            kv_numbers_after=shape.cache_width if shape else kept,
        )

    def _report(self, headers: list[TensorHeader]) -> ConversionReport:
        plan = self._plan
        layers = (
            self._layer_reports.get(item.layer) or self._layer_report(item.layer, None, None) for item in plan.layers
        )
        before = [header for name, header in plan.index.headers.items() if name not in plan.dropped]
        return ConversionReport(
            source="",
            output="",
            init=plan.options.init,
            model_type=f"{MODEL_TYPE_PREFIX}{plan.family.model_type}",
            dtype=plan.dtype,
            layers=tuple(layers),
            kv_bytes_per_number=DTYPE_BYTES[plan.dtype],
            parameters_before=num_parameters(before),
            parameters_after=num_parameters(headers),
            dropped=plan.dropped,
        )

    def _write_companions(self, writer: CheckpointWriter, report: ConversionReport) -> None:
        """Everything beside the weights: configuration, code, tokenizer and licences of the source, report, model card."""
        index = self._plan.index
        for relative in index.companion_files():
            writer.copy_file(index.folder / relative, relative)
        for name, file in code_files().items():
            writer.copy_file(file, Path(name))
        writer.write_text("config.json", json.dumps(output_config(self._plan), indent=2) + "\n")
        writer.write_text(REPORT_FILE, json.dumps(report.reproducible(), indent=2) + "\n")
        writer.write_text("README.md", model_card(self._plan, report))

    def _advance(self, what: str, cost: float) -> None:
        self._done += cost
        self._on_progress(what, self._done, self._total)


def output_config(plan: ConversionPlan) -> dict[str, Any]:
    """config.json of the output: the source's own, with an honest model_type and the widths of every layer."""
    prefix, index, options = plan.family.class_prefix, plan.index, plan.options
    config = {key: value for key, value in index.config.items() if key != "_name_or_path"}
    if options.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = options.dtype
    given = {name: getattr(options, name) for name in ("init", "rank", "energy", "fixed_ends", "layers")}
    return {
        **config,
        "model_type": f"{MODEL_TYPE_PREFIX}{plan.family.model_type}",
        "architectures": [f"Xeco{prefix}ForCausalLM"],
        "auto_map": auto_map(prefix),
        "mla_layers": [None if item.shape is None else layer_entry(item.shape) for item in plan.layers],
        "conversion": {
            "format_version": FORMAT_VERSION,
            "tool": f"xeco-convert {__version__}",
            "source": {
                "model_type": plan.family.model_type,
                "path": index.hub_id or str(index.folder),
                "revision": index.revision,
            },
            "options": {name: value for name, value in given.items() if value not in (None, False)},
        },
    }


def layer_entry(shape: MlaShape) -> dict[str, Any]:
    """A layer's entry of mla_layers."""
    return MlaLayer(
        kv_lora_rank=shape.kv_lora_rank,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
        v_head_dim=shape.v_head_dim,
        q_lora_rank=shape.q_lora_rank,
        latent_norm=shape.latent_norm,
        rope_index=shape.rope_index,
        biases=shape.biases,
    ).to_dict()


def _device(name: str) -> torch.device:
    """The device by name. Raises `OptionError` where torch does not know or have it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"--device: {name!r} cannot be used here ({reason}); choose cpu, or cuda where a GPU is present."
        ) from None
    return device
