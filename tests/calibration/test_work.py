"""--work-dir: results are there whole or not at all, are used again, and belong to one source and one set of options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import work_folder_for

import xeco_convert
from xeco_convert.calibration import survey
from xeco_convert.errors import OptionError, OutputError
from xeco_convert.factorize.statistics import StatisticsAccumulator
from xeco_convert.inits.calibrated import measurements
from xeco_convert.inits.calibrated.layers import CalibratedLayers


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, 96, (1400,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path / "text.txt"


def test_what_is_saved_is_loaded(llama: Path, tmp_path: Path) -> None:
    work = work_folder_for(llama, work_dir=str(tmp_path / "a" / "work"))
    assert work.load("some") is None
    work.save("some", {"tensor": torch.arange(3), "text": "é", "none": None, "pairs": (1, 2)})
    again = work_folder_for(llama, work_dir=str(tmp_path / "a" / "work")).load("some")
    assert again is not None and again["tensor"].tolist() == [0, 1, 2] and again["text"] == "é"
    assert again["none"] is None and again["pairs"] == (1, 2)
    assert sorted(path.name for path in (tmp_path / "a" / "work").iterdir()) == ["run.json", "some.pt"]


def test_without_a_folder_nothing_is_left(llama: Path) -> None:
    work = work_folder_for(llama)
    work.save("some", {"a": 1})
    folder = work._folder
    assert work.load("some") == {"a": 1}
    del work
    assert not folder.exists()


@pytest.mark.parametrize(
    "change", [{"rank": 9}, {"seed": 1}, {"calibration": "b.txt"}, {"layers": "0"}, {"refine": True}]
)
def test_other_options_are_refused(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    work_folder_for(llama, work_dir=str(tmp_path / "work"))
    with pytest.raises(OptionError, match=r"--work-dir: .*other options; repeat that run's options .* empty folder"):
        work_folder_for(llama, work_dir=str(tmp_path / "work"), **change)


@pytest.mark.parametrize("change", [{"overwrite": True}, {"dtype": "bfloat16"}, {"verify": True}])
def test_options_without_influence_are_not(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    work_folder_for(llama, work_dir=str(tmp_path / "work"))
    work_folder_for(llama, work_dir=str(tmp_path / "work"), **change)


def test_changed_calibration_text_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    options = {"work_dir": str(tmp_path / "work"), "calibration": str(text)}
    work_folder_for(llama, **options)
    text.write_text(text.read_text() + " w5 w6")
    with pytest.raises(OptionError, match="--work-dir"):
        work_folder_for(llama, **options)


def test_changed_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    work_folder_for(llama, work_dir=str(tmp_path / "work"))
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    os.utime(other / "model.safetensors", (1, 1))
    with pytest.raises(OptionError, match="--work-dir"):
        work_folder_for(other, work_dir=str(tmp_path / "work"))


@pytest.mark.parametrize("content", ["", "{", "[]", "5"])
def test_a_corrupted_marker_is_refused(content: str, llama: Path, tmp_path: Path) -> None:
    work_folder_for(llama, work_dir=str(tmp_path / "work"))
    (tmp_path / "work" / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"--work-dir: .* cannot be used .*choose another folder"):
        work_folder_for(llama, work_dir=str(tmp_path / "work"))


def test_a_file_is_no_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(OutputError, match="--work-dir"):
        work_folder_for(llama, work_dir=str(tmp_path / "work"))


def test_a_damaged_result_is_refused(llama: Path, tmp_path: Path) -> None:
    work = work_folder_for(llama, work_dir=str(tmp_path / "work"))
    (tmp_path / "work" / "some.pt").write_bytes(b"PK damaged")
    with pytest.raises(OutputError, match=r"--work-dir: .*some\.pt is damaged; delete it"):
        work.load("some")


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on_where_it_was(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the last layer of the conversion: the statistics of the survey and the first two layers' factors are there."""
    options = {"kv_size": "50%", "calibration": str(text), "calibration_tokens": 1024, "work_dir": str(tmp_path / "w")}
    monkeypatch.setattr(survey, "MEASURING_TOKENS", 128)
    expected = xeco_convert.convert(llama, tmp_path / "whole", **{**options, "work_dir": None})
    factorised = CalibratedLayers._factorised
    done: list[int] = []

    def interrupted(self: Any, view: Any, *arguments: Any) -> Any:
        if view.number == 2:
            raise KeyboardInterrupt
        return factorised(self, view, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedLayers, "_factorised", interrupted)
        with pytest.raises(KeyboardInterrupt):
            xeco_convert.convert(llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

    def counted(self: Any, view: Any, *arguments: Any) -> Any:
        done.append(view.number)
        return factorised(self, view, *arguments)

    add, added = StatisticsAccumulator.add, []

    def rest_alone(self: Any, inputs: Any, counts: Any) -> None:
        added.append(inputs.shape[0])
        add(self, inputs, counts)

    def refused(*_arguments: Any) -> None:
        raise AssertionError("windows are kept")

    monkeypatch.setattr(CalibratedLayers, "_factorised", counted)
    monkeypatch.setattr(StatisticsAccumulator, "add", rest_alone)
    monkeypatch.setattr(measurements, "calibration_windows", refused)
    report = xeco_convert.convert(llama, tmp_path / "out", **options)
    assert done == [2]
    # the last layer's windows that the survey took no statistics of: half of 1024 tokens in windows of 64
    assert sum(added) == 8
    assert report.reproducible() == expected.reproducible()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
