"""Stage (a): every converted layer regressed on the source's own, by xeco_convert's refinement, on more text.

The source streams layer by layer, so neither model is in memory as a whole. A layer sees either the hidden states that the
healed layers below it produce (it then also repairs what they got wrong) or the source's (layers are independent then, and
several processes share them). What is finished of a layer is kept in the work folder.

Letters: W windows, T tokens, X hidden_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.stream import LayerView, SourceStream
from xeco_convert.calibration.windows import windows_of_documents
from xeco_convert.checkpoint import CheckpointIndex, TensorReader
from xeco_convert.factorize.attention import AttentionContext
from xeco_convert.factorize.layer_weights import MlaAttention
from xeco_convert.files import write_whole
from xeco_convert.refine import LayerRefinement, RefineOptions
from xeco_convert.source import open_source

from ..attention import attention_prefixes, layer_shape, student_family
from ..data import PackedRows
from ..options import DistillOptions

Progress = Callable[[str, float, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class LayerwiseResult:
    """Held-out relative squared error after each layer, by layer and by stage of the refinement, and what was kept."""

    errors: dict[int, dict[str, float]]
    kept: dict[int, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"errors": self.errors, "kept": self.kept}


class LayerwiseStage:
    """Heals the layers of `student` one at a time; results of each stay in `folder`."""

    def __init__(
        self,
        student: CheckpointIndex,
        source: CheckpointIndex,
        rows: PackedRows,
        folder: Path,
        options: DistillOptions,
        device: torch.device,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`share`: (number of this process, how many there are); more than one only where layers see the source's inputs."""
        self._student = student
        self._reader = TensorReader(student)
        self._config = _model_config(student)
        self._opened = open_source(source)
        self._folder = folder
        self._options = options
        self._device = device
        self._share = share
        folder.mkdir(parents=True, exist_ok=True)
        self._windows = windows_of(rows, options.layer_tokens)
        self._stream = SourceStream(self._opened, self._windows, device)

    def run(self, on_progress: Progress) -> None:
        """Heal every converted layer that is not healed yet."""
        healed: Tensor | None = None
        chained = self._options.layer_inputs == "healed"
        for view in self._stream.layers():
            on_progress("layers", view.number / self._opened.geometry.num_hidden_layers, {"layer": float(view.number)})
            if chained:
                healed = view.inputs.clone() if healed is None else healed
            mine = view.number % self._share[1] == self._share[0]
            factors = None
            if self._config.layer(view.number) is not None and (chained or mine):
                factors = self._healed_layer(view, view.inputs if healed is None else healed)
            if healed is not None:
                self._advance(view, healed, factors)
        on_progress("layers", 1.0, {})

    def result(self) -> LayerwiseResult:
        """What the finished layers say."""
        stored = {layer: self._load(layer) for layer in self._converted()}
        done = {layer: data for layer, data in stored.items() if data is not None}
        return LayerwiseResult(
            errors={layer: data["errors"] for layer, data in done.items()},
            kept={layer: data["kept"] for layer, data in done.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All healed weights, float32, by their full names."""
        found: dict[str, Tensor] = {}
        for layer in self._converted():
            data = self._load(layer)
            assert data is not None, "all layers are healed before they are collected"
            factors = MlaAttention(**data["factors"])
            found |= {f"{self._module(layer)}.{name}": part for name, part in factors.state_dict().items()}
        return found

    def _converted(self) -> list[int]:
        return [
            number
            for number in range(self._opened.geometry.num_hidden_layers)
            if self._config.layer(number) is not None
        ]

    def _healed_layer(self, view: LayerView, inputs: Tensor) -> MlaAttention:
        stored = self._load(view.number)
        if stored is None:
            heads, windows = self._opened.geometry.num_attention_heads, self._windows.ids.shape[0]
            refinement = LayerRefinement(view, heads, inputs, windows, self._refine_options(), self._context(view))
            with torch.random.fork_rng(devices=[]):
                refined = refinement.run(self._own_layer(view.number))
            stored = {"factors": vars(refined.factors), "errors": refined.errors, "kept": refined.kept}
            self._save(view.number, stored)
        factors = MlaAttention(**stored["factors"])
        return factors.with_tensors({name: part.to(self._device) for name, part in factors.tensors().items()})

    def _own_layer(self, number: int) -> MlaAttention:
        module = self._module(number)
        names = [name for name in self._student.headers if name.startswith(f"{module}.")]
        read = {name: self._reader.read(name, dtype=torch.float32, device=self._device) for name in names}
        own = {name.removeprefix(f"{module}."): part for name, part in read.items()}
        return MlaAttention.from_state_dict(own, layer_shape(self._config, number), f"{self._student.folder}: {module}")

    def _module(self, number: int) -> str:
        """Name of a layer's attention module in the student."""
        return student_family(self._config.model_type).module_name(number)

    def _context(self, view: LayerView) -> AttentionContext:
        """With the layer's own rotary tables where it does not use the source's frequencies, as the model has them."""
        context = view.context()
        layer = self._config.layer(view.number)
        if layer.rope_index is not None:
            return context
        cos, sin = own_rotary_tables(self._config, layer.qk_rope_head_dim, view.inputs.shape[1])
        return dataclasses.replace(context, own_cos=cos.to(self._device), own_sin=sin.to(self._device))

    def _refine_options(self) -> RefineOptions:
        minutes, layers = self._options.layer_minutes, len(self._converted())
        return RefineOptions(
            steps=self._options.layer_steps,
            seconds=None if minutes is None else minutes * 60 / layers,
            seed=self._options.seed,
        )

    def _advance(self, view: LayerView, healed: Tensor, factors: MlaAttention | None) -> None:
        """Move the healed model's hidden states through its own layer, which may rotate by frequencies of its own."""
        context = None if factors is None else self._context(view)
        view.advance(healed, factors, self._opened.geometry.num_attention_heads, context)

    def _load(self, layer: int) -> dict[str, Any] | None:
        file = self._folder / f"layer-{layer:03d}.pt"
        return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None

    def _save(self, layer: int, data: dict[str, Any]) -> None:
        file = self._folder / f"layer-{layer:03d}.pt"
        write_whole(file, lambda partial: torch.save(data, partial))


def windows_of(rows: PackedRows, num_tokens: int) -> CalibrationWindows:
    """The documents of the rows as windows, padded on the right and never joined: the stream knows no packed rows."""
    documents = rows.documents(num_tokens)
    length = min(rows.length, max(len(document) for document in documents))
    return windows_of_documents(
        documents, length=length, num_tokens=num_tokens, special_ids=frozenset(), description="training rows"
    )


def own_rotary_tables(config: Any, width: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, length, width] of a layer with frequencies of its own, from the module that the model would build."""
    import copy

    from transformers import AutoModel

    own = copy.deepcopy(config)
    own.head_dim = width
    with torch.device("meta"):
        rotary_class = type(AutoModel.from_config(config).rotary_emb)
    cos, sin = rotary_class(config=own)(torch.zeros(1, 1, 1), torch.arange(length)[None])
    return cos, sin


def same_outside_attention(student: CheckpointIndex, source: CheckpointIndex) -> str | None:
    """The first tensor outside converted attention in which the two differ; None where there is none.

    The layer-wise stage aims at the source with the source's feed-forward parts, so the student must still have them. `source`
    has the names under which transformers looks for its tensors (`open_source`), as a converted checkpoint has.
    """
    readers, converted = (TensorReader(student), TensorReader(source)), attention_prefixes(student)
    for name in student.headers:
        if name.startswith(converted):
            continue
        if name not in source.headers or student.headers[name].shape != source.headers[name].shape:
            return name
        pairs = zip(*(reader.read_chunks(name) for reader in readers), strict=False)
        for own, other in pairs:
            if own.shape != other.shape or not torch.equal(own, other.to(own.dtype)):
                return name
    return None


def _model_config(student: CheckpointIndex) -> Any:
    from transformers import AutoConfig

    import xeco_convert  # noqa: F401  registers the converted families

    return AutoConfig.from_pretrained(student.folder)
