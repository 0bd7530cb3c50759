"""A small converted model with a teacher that speaks: the embedded model, for healing runs that end in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import xeco_convert
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in a folder of its own, as a source."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder


@pytest.fixture(scope="session")
def converted_demo(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted by the published initialisation; not to be changed by tests."""
    output = tmp_path_factory.mktemp("student") / "out"
    xeco_convert.convert(teacher_folder, output, init="paper", rank=24, rope_dim=16)
    return output


@pytest.fixture
def out(converted_demo: Path, tmp_path: Path) -> Path:
    """A copy that a test may heal."""
    folder = tmp_path / "out"
    shutil.copytree(converted_demo, folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in the embedded model's language."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(generate_text(seed=11, num_stories=60), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """The files of a folder by name, with their bytes."""
    return lambda folder: {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
