"""A converted checkpoint and its teacher, bound once: what healing and measuring work on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.errors import CheckpointError, OptionError, UnsupportedModelError
from xeco_convert.inspect_checkpoint import inspect_checkpoint
from xeco_convert.pretrained import resolved

from .teacher import TeacherFiles, check_vocabulary, find_teacher

_DEFAULT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Student and teacher on disk. `seq_length`: tokens of a row; `kv_bytes_before` and `kv_bytes_after`: what the source and the
    student cache per token, in bytes."""

    student: CheckpointIndex
    teacher: TeacherFiles
    seq_length: int
    kv_bytes_before: int
    kv_bytes_after: int


def open_pair(folder: Path, teacher: str | None, revision: str | None, seq_length: int | None) -> ModelPair:
    """Bind the converted checkpoint in `folder` to the teacher that is named, or to its source.

    Raises `CheckpointError` where `folder` is no converted checkpoint, `UnsupportedModelError`, `TeacherError`, `OptionError`.
    """
    facts = inspect_checkpoint(folder)
    if facts["text_model_type"] != facts["model_type"]:
        raise UnsupportedModelError(
            f"{folder}: a {facts['model_type']} model is one of text and images, expected a text model: what it is healed on is "
            "text, and images would not be seen. Convert and heal its text model alone (docs/faq.md says how to save it)."
        )
    student = resolved(CheckpointIndex.open(folder))
    files = find_teacher(student, teacher, revision)
    check_vocabulary(student, files)
    return ModelPair(
        student=student,
        teacher=files,
        seq_length=_seq_length(student, files, seq_length),
        kv_bytes_before=facts["kv_bytes_before"],
        kv_bytes_after=facts["kv_bytes_after"],
    )


def _seq_length(student: CheckpointIndex, teacher: TeacherFiles, seq_length: int | None) -> int:
    limits = [index.config.get("max_position_embeddings") for index in (student, teacher.index)]
    longest = min((limit for limit in limits if type(limit) is int and limit > 0), default=None)
    if seq_length is None:
        return _DEFAULT_LENGTH if longest is None else min(_DEFAULT_LENGTH, longest)
    if longest is not None and seq_length > longest:
        raise OptionError(
            f"--seq-length: expected at most {longest}, the longest context of student and teacher "
            f"(max_position_embeddings), found {seq_length}; choose a smaller value."
        )
    return seq_length


def refuse_foreign_folder(folder: Path) -> None:
    """A folder that is no checkpoint at all, in one sentence."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder that xeco-convert wrote, found nothing; check the path.")
