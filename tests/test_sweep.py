"""`xeco-convert sweep`: a row for each size, on stdout, as JSON and as a page; what cannot be met is told, not a crash."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.cli import main
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text
from xeco_convert.inits.calibrated import measurements
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan
from xeco_convert.sweep import SweepPoint, SweepReport, _curves, parse_sizes, sweep, sweep_page

TOKENS = 1024


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of the embedded model's language: sampling it takes longer than most else. One test has it sampled."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(generate_text(num_stories=100, seed=3), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def report(text: Path) -> SweepReport:
    """Three sizes, one of them out of reach, in an order that is not sorted."""
    options = ConvertOptions(kv_size="100%", calibration=str(text), calibration_tokens=TOKENS)
    return sweep(MODEL_FOLDER, ("25%", "5%", "50%"), options)


def test_perplexity_falls_and_agreement_grows_with_the_size(report: SweepReport) -> None:
    small, _, large = (point.fidelity for point in report.points)
    assert small is not None and large is not None
    assert small["perplexity"] > large["perplexity"] > 0.99 * large["perplexity_source"]
    assert small["kl"] > large["kl"] > 0 and small["top1"] < large["top1"] <= 1
    assert small["perplexity_source"] == large["perplexity_source"] == report.perplexity_source
    small_bytes, none, large_bytes = (point.kv_bytes_per_token for point in report.points)
    # at most the budget; which steps of 2 numbers are left over depends on measured costs, and so on the processor's rounding
    assert none is None and 256 - 32 < (small_bytes or 0) <= 256 and 512 - 32 < (large_bytes or 0) <= 512


def test_every_number_of_bits_is_a_curve_and_the_best_are_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", tmp_path / "sweep.json", "--html", tmp_path / "sweep.html"]
    sizes = ["--kv-sizes", "40,20,8", "--cache-bits", "16,4", "--calibration", text, "--calibration-tokens", TOKENS]
    assert run("sweep", MODEL_FOLDER, *sizes, *files) == 0
    out = capsys.readouterr().out
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [(point["kv_size"], point["cache_bits"]) for point in points] == [
        (size, bits) for size in ("40%", "20%", "8%") for bits in ("16", "4")
    ]
    assert "8% in 16 bits: --kv-size: expected at least" in out
    kls = [None if point["fidelity"] is None else point["fidelity"]["kl"] for point in points]
    assert kls[4] is None and kls[3] < kls[2]  # 20 %: more numbers in fewer bits are better
    best = out.split("Beaten by no other of as few bytes: ")[1].splitlines()[0]
    assert "20% in 4 bits" in best and "20% in 16 bits" not in best
    data = json.loads((tmp_path / "sweep.json").read_text())
    report = SweepReport(**{**data, "points": tuple(SweepPoint(**point) for point in points)})
    curves = _curves(report)
    assert {label: [point.kv_size for point in curve] for label, curve in curves.items()} == {
        "16 bits": ["20%", "40%"],
        "4 bits": ["8%", "20%", "40%"],
        "least KL": ["8%", "20%", "40%"],
    }
    assert "<td>8%</td><td>4</td>" in (tmp_path / "sweep.html").read_text()


def test_a_size_out_of_reach_says_the_smallest_possible(report: SweepReport) -> None:
    (problem,) = report.problems()
    assert problem.startswith("5%: --kv-size: expected at least 9.4% (96 bytes per token)")


def test_the_page_and_the_data_have_a_row_for_each_size(report: SweepReport) -> None:
    page = sweep_page(report)
    assert page == sweep_page(report)
    for row in report.rows():
        assert f"<tr><td>{row[0]}</td>" in page
    assert "expected at least 9.4%" in page
    assert [point["kv_size"] for point in json.loads(json.dumps(report.to_dict()))["points"]] == ["25%", "5%", "50%"]


def test_a_second_size_reuses_text_and_statistics_and_changes_nothing(
    report: SweepReport, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions(kv_size="50%", calibration=str(text), calibration_tokens=TOKENS)
    plan = make_plan(CheckpointIndex.open(MODEL_FOLDER), options)
    begin = partial(plan.options.initialisation.begin, plan, torch.device("cpu"), lambda what, share: None)
    alone = begin()
    final = plan.with_widths_of(alone)
    assert [layer.layer for layer in alone.layers(final)] == [0, 1, 2, 3]
    assert alone.summary()["fidelity"] == report.points[2].fidelity
    for name in ("calibration_windows", "StatisticsAccumulator"):
        monkeypatch.setattr(measurements, name, None)  # asked for once more, this fails
    assert next(iter(begin(measured_by=alone).layers(final))).layer == 0


def test_the_command_prints_the_table_and_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", tmp_path / "sweep.json", "--html", tmp_path / "sweep.html"]
    assert run("sweep", MODEL_FOLDER, "--kv-sizes", "80", "--layers", "0", "--calibration-tokens", TOKENS, *files) == 0
    lines = capsys.readouterr().out.splitlines()
    point = json.loads((tmp_path / "sweep.json").read_text())["points"][0]
    assert lines[0].split()[:2] == ["KV", "size"]
    assert lines[2].split()[:4] == ["80%", "16", str(point["kv_bytes_per_token"]), f"{point['kv_share']:.1%}"]
    assert point["kv_share"] <= 0.8 and len(point["widths"]) == 1
    assert "<td>80%</td>" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-sizes", "half"], "--kv-sizes: expected percentages such as 75,50,25, at most 100, found 'half'"),
        (["--kv-sizes", "150"], "--kv-sizes: expected percentages"),
        (["--kv-sizes", "5", "--calibration-tokens", "1024"], "expected at least 9.4%"),
        (["--cache-bits", "16,7"], "--cache-bits: expected some of 16, 8, 4, 3, 2, auto, found '16,7'"),
        (["--layers", "9"], "--layers: expected layers from 0 to 3, found 9"),
        (["--refine-steps", "3"], "--refine-steps: only with --refine"),
        (["--html", "no/such/folder/page.html"], "--html: no/such/folder/page.html cannot be written"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("sweep", MODEL_FOLDER, *arguments)
    assert code == (1 if "--html" in arguments else 2)
    found = capsys.readouterr()
    assert sentence in found.err.replace("\n", " ") and found.out == ""


def test_too_little_text_is_told_as_in_a_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    assert run("sweep", MODEL_FOLDER, "--calibration", tmp_path / "short.txt") == 1
    assert "expected at least 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("75,50,25,12.5", ("75%", "50%", "25%", "12.5%")),
        (" 50% , 0.25,50", ("50%", "25%")),
        ("100,0.5%", ("100%", "0.5%")),
    ],
)
def test_sizes_are_percentages_or_shares(text: str, sizes: tuple[str, ...]) -> None:
    assert parse_sizes(text) == sizes
