"""The examples run from the first line to the last on the embedded model, without a download, and print what they promise."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

import xeco_convert
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text of the embedded model's language: sampling it from the model takes longer than all else."""
    file = tmp_path / "my.txt"
    file.write_text(generate_text(num_stories=100, seed=3), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _work_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples without a folder to write make a temporary one: below the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run_example(name: str, *arguments: str) -> None:
    """Run `examples/<name>` as the command line does, in this process; raises what it raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def number(pattern: str, text: str) -> float:
    """The number that the group of `pattern` matches in `text`."""
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in:\n{text}"
    return float(match.group(1))


def test_every_example_is_listed_and_tested() -> None:
    names = {file.name for file in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert names == listed == {"python_api.py", "custom_calibration.py", "convert_heal_serve.py"}


def test_the_readme_s_lines_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands behind its command works on what the command writes."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(lines) == 1
    monkeypatch.chdir(tmp_path)
    xeco_convert.convert(MODEL_FOLDER, "out/", rank=64, rope_dim=16, init="paper")
    exec(lines[0].replace("Once upon a time", "Otto was a clever boy"), {})
    assert "Otto was a clever boy" in capsys.readouterr().out


def test_python_api(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    run_example("python_api.py", str(MODEL_FOLDER), str(output), "--text", str(text), "--calibration-tokens", "1024")
    printed = capsys.readouterr().out
    half, quarter = (number(rf"KV size {size}: KL ([\d.]+)", printed) for size in ("50%", "25%"))
    assert half < quarter
    assert 40 < number(r"bytes per token \(([\d.]+)%\)", printed) <= 50
    widths = re.findall(r"layer \d: latent (\d+) \+ rotary key (\d+)", printed)
    cached = re.findall(r"layer \d caches \(1, 1, \d+, (\d+)\) and \(1, 1, \d+, (\d+)\)", printed)
    assert len(widths) == 4 and cached == widths
    assert "Otto was a clever boy" in printed
    assert (output / "config.json").is_file()


def test_custom_calibration(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("custom_calibration.py", str(MODEL_FOLDER), "--text", str(text), "--tokens", "1024", "--windows", "2")
    printed = capsys.readouterr().out
    assert "measured on 256 held-out tokens" in printed
    for name in ("your text", "the model's samples"):
        assert 0 < number(rf"calibrated on {name}: perplexity .* KL ([\d.]+)", printed) < 0.5
    calibration = next(tmp_path.glob("xeco-example-*/calibration.txt")).read_text(encoding="utf-8")
    whole = text.read_text(encoding="utf-8")
    assert whole.startswith(calibration) and len(calibration) <= 0.9 * len(whole)  # the rest measures


def test_convert_heal_serve(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "--text": text,
        "--calibration-tokens": 512,
        "--heal-tokens": 1024,
        "--layer-steps": 4,
        "--eval-tokens": 512,
    }
    pairs = [part for flag, value in settings.items() for part in (flag, str(value))]
    run_example("convert_heal_serve.py", str(MODEL_FOLDER), str(tmp_path / "work"), *pairs)
    printed = capsys.readouterr().out
    assert number(r"1\. converted: .* \(([\d.]+)%\)", printed) <= 50
    before = number(r"KL ([\d.]+) ->", printed)
    assert number(r"-> ([\d.]+) nats per token", printed) < before
    assert number(r"same top token ([\d.]+)%", printed) > 80
    assert "4. Otto was a clever boy" in printed
    assert re.search(r"5\. exported: latent \d+ \+ rotary key \d+ numbers", printed)
    assert "transformers serve" in printed and "vllm serve" in printed
    assert '"deepseek_v3"' in (tmp_path / "work" / "exported" / "config.json").read_text(encoding="utf-8")
    assert (tmp_path / "work" / "converted.before-healing").is_dir()
