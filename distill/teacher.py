"""The teacher: where it comes from, whether it speaks the student's vocabulary, and what the losses need of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, UnsupportedModelError
from xeco_convert.pretrained import resolved
from xeco_convert.quality import OutputHead
from xeco_convert.tokenizer import TokenizerFiles, first_difference

from .errors import TeacherError
from .losses.prediction import Prediction, TopKPrediction


@dataclass(frozen=True, kw_only=True)
class TeacherFiles:
    """Where the teacher's files are. `name`: as the user knows it; `is_source`: the model that OUT was converted from."""

    index: CheckpointIndex
    name: str
    is_source: bool

    @property
    def folder(self) -> Path:
        return self.index.folder

    def fingerprint(self) -> str:
        """What its outputs depend on: configuration, and names, sizes and times of its weight files."""
        files = {path: path.stat() for path in set(self.index.files.values())}
        facts = sorted((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in files.items())
        return hashlib.sha256(repr((dict(self.index.config), facts)).encode()).hexdigest()


def find_teacher(student: CheckpointIndex, teacher: str | None, revision: str | None) -> TeacherFiles:
    """The model that --teacher names, else the source that the student's config.json records.

    Raises `TeacherError` where none is recorded, or it is not where it was.
    """
    recorded = (student.config.get("conversion") or {}).get("source") or {}
    path = teacher or recorded.get("path")
    if not path:
        raise TeacherError(
            f"{student.folder}: config.json records no source to learn from, expected conversion.source; give --teacher MODEL."
        )
    try:
        index = resolved(CheckpointIndex.open(path, revision if teacher else recorded.get("revision")))
    except CheckpointError as error:
        what = "--teacher" if teacher else f"{student.folder}: the source recorded in config.json"
        advice = "" if teacher else " If it lies elsewhere now, give --teacher MODEL."
        raise TeacherError(f"{what}: {error}{advice}") from None
    return TeacherFiles(index=index, name=str(path), is_source=_same_shape(index, student))


def _same_shape(teacher: CheckpointIndex, student: CheckpointIndex) -> bool:
    """Whether the student's layers are the teacher's: what the layer-wise stage needs."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    kind = (student.config.get("conversion") or {}).get("source", {}).get("model_type")
    same = all(teacher.config.get(name) == student.config.get(name) for name in names)
    return same and (kind is None or teacher.config.get("model_type") == kind)


def check_vocabulary(student: CheckpointIndex, teacher: TeacherFiles) -> None:
    """Whether both read and write the same tokens. Raises `TeacherError` naming the first that differs."""
    places = TokenizerFiles.of(teacher.index), TokenizerFiles(folder=student.folder)
    sizes = [index.config.get("vocab_size") for index in (student, teacher.index)]
    if not all(place.exists for place in places):
        if sizes[0] != sizes[1]:
            raise TeacherError(
                f"{teacher.name}: has a vocabulary of {sizes[1]}, the student of {sizes[0]}, expected the same; "
                "choose a teacher of the student's family."
            )
        return
    theirs, own = (place.load() for place in places)
    difference = first_difference(own, theirs, settings=False)
    if difference is not None:
        advice = "choose a teacher of the student's family"
        if teacher.is_source:
            advice += f"; if OUT was converted from it, `xeco-convert refresh {student.folder}` renews OUT's tokenizer"
        raise TeacherError(
            f"{teacher.name}: its tokenizer differs from the student's: {difference.probe} {difference.actual}, for the student "
            f"{difference.expected}; {advice}."
        )


def output_head(model: Any, vocabulary: int | None = None) -> OutputHead:
    """The head of a causal language model, of the first entries of its vocabulary, or of all."""
    from torch.distributed.tensor import DTensor

    head = OutputHead.of_model(model)
    if isinstance(head.weight, DTensor):  # a sharded teacher, outside its own forward
        if head.weight.requires_grad:
            raise RuntimeError("the student's head is read inside its own forward, where it is whole")
        head = replace(head, weight=head.weight.full_tensor())
    return head.first(vocabulary or head.weight.shape[0])


@torch.no_grad()
def check_head(model: Any, what: str) -> None:
    """Whether hidden states and head give the model's own logits. Raises `UnsupportedModelError` where they do not."""
    device = next(model.parameters()).device
    probe = torch.arange(4, device=device)[None] % model.config.vocab_size
    was_training = model.training
    model.eval()
    expected = model(input_ids=probe, use_cache=False).logits.float()
    logits = output_head(model).logits(hidden_states(model, probe, None)).float()
    model.train(was_training)
    # the same products in the same dtype: one part in a hundred is far above rounding
    if not torch.allclose(logits, expected, rtol=0.01, atol=0.01 * float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{what}: {model.config.model_type} changes its logits after the output projection in a way that healing does "
            "not know; its loss would be wrong."
        )


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    """Hidden states [B, L, X] after the last norm: what the head is applied to."""
    decoder: nn.Module = model.get_decoder()
    result: Tensor = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return result


class Teacher:
    """A frozen model that predicts for the student's rows; on every device, whole or sharded."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self._vocabulary = vocabulary

    @torch.no_grad()
    def predict(self, input_ids: Tensor, position_ids: Tensor) -> Prediction:
        """Hidden states [B, L, X] and the head, cut to the student's vocabulary."""
        device = next(self.model.parameters()).device
        hidden = hidden_states(self.model, input_ids.to(device), position_ids.to(device))
        return Prediction(hidden=hidden, head=output_head(self.model, self._vocabulary))


class KeptTeacher:
    """The teacher's top-k predictions of every row, from disk."""

    def __init__(self, ids: Any, log_probabilities: Any) -> None:
        self._ids, self._log_probabilities = ids, log_probabilities

    def predict_rows(self, rows: Tensor) -> TopKPrediction:
        """Predictions [B, L, K] for rows of these numbers."""
        index = rows.cpu().numpy()
        ids = torch.from_numpy(self._ids[index].astype("int64"))
        logp = torch.from_numpy(self._log_probabilities[index].astype("float32"))
        return TopKPrediction(ids=ids.to(rows.device), log_probabilities=logp.to(rows.device))
