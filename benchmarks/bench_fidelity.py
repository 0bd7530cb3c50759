"""How good a converted model is before any training: perplexity, KL to the source and top-1 agreement at given KV sizes.

    python benchmarks/bench_fidelity.py --preset tinystories-gqa-calibrated
    python benchmarks/bench_fidelity.py --checkpoint IN --text FILE --window 512 --num-windows 24 --kv 24+8 48+16

Ways to convert: paper, calibrated (on text), sampled (calibrated on samples of the source), refined (calibrated on text, with
--refine), and the baselines of baselines.py: weights, transmla. A preset makes a table of results/fidelity.md with its exact
settings, prints the expected figure beside the measured one, and exits with 1 where they differ by more than 5 %, or where a
perplexity is above the one that must be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES, baseline_model
from reporting import describe, format_table, machine_facts, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from xeco_convert import convert
from xeco_convert.calibration import CalibrationWindows
from xeco_convert.calibration.text import read_windows as read_calibration
from xeco_convert.errors import OptionError, XecoError
from xeco_convert.evaluate import Fidelity, measure_fidelity, sequence_windows, token_windows
from xeco_convert.inits.calibrated import CalibratedInitialisation
from xeco_convert.options import ConvertOptions
from xeco_convert.report import ConversionReport

_REPOSITORY = Path(__file__).resolve().parents[1]
TOLERANCE = 0.05
METHODS = ("paper", *BASELINES, "calibrated", "sampled", "refined")
_CALIBRATION_WINDOW = 512  # the package's own


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a published table, and its perplexities: of the source, and by (init, KV size)."""

    checkpoint: str
    text: str | None = None
    ids: str | None = None
    part: str = ":"
    window: int
    num_windows: int
    kv: tuple[str, ...]
    expected_source: float
    expected: Mapping[tuple[str, str], float] = field(default_factory=dict)
    init: tuple[str, ...] = ("paper",)
    # rank + rope of those that have no KV budget, by KV size and method: the best that were tried
    pairs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    attended: bool = True
    calibration: str | None = None
    calibration_part: str = ":"
    calibration_tokens: tuple[int, ...] | None = None
    refined_tokens: int | None = None
    # perplexities that must be reached or beaten, and those aimed at, by method and KV size
    bounds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    aims: Mapping[tuple[str, str], float] = field(default_factory=dict)


def _column(method: str, **perplexities: float) -> dict[tuple[str, str], float]:
    """By (method, KV size) from names such as kv16_8 (16+8) and kv12p5 (12.5%)."""
    names = {name: name.removeprefix("kv") for name in perplexities}
    sizes = {
        name: text.replace("_", "+") if "_" in text else f"{text.replace('p', '.')}%" for name, text in names.items()
    }
    return {(method, sizes[name]): value for name, value in perplexities.items()}


def _pairs(**baselines: str) -> dict[str, str]:
    return {"paper": baselines["paper"], **dict.fromkeys(BASELINES, baselines["others"])}


# Expected figures are those of an independent implementation, written before this package; paths are relative to $XECO_SHARED.
PRESETS = {
    "stories260k": Preset(
        checkpoint="checkpoints/stories260k",
        ids="text/stories260k_samples.json",
        part="-80:",
        window=256,
        num_windows=80,
        kv=("40+8", "24+8", "16+8", "12+4"),
        expected_source=3.53,
        expected=_column("paper", kv40_8=138.3, kv24_8=147.4, kv16_8=191.9, kv12_4=191.1),
    ),
    "tinystories-gqa": Preset(
        checkpoint="checkpoints/tinystories-gqa",
        text="text/valid.txt",
        window=512,
        num_windows=24,
        kv=("96+32", "48+16", "32+32", "24+8", "16+16"),
        expected_source=15.04,
        expected=_column("paper", kv96_32=103.7, kv48_16=171.9, kv32_32=109.7, kv24_8=151.8, kv16_16=171.8),
    ),
    "stories260k-calibrated": Preset(
        checkpoint="checkpoints/stories260k",
        ids="text/stories260k_samples.json",
        part="-80:",
        window=256,
        num_windows=80,
        kv=("50%", "37.5%", "25%"),
        expected_source=3.53,
        expected=_column("paper", kv24_8=147.4, kv16_8=191.9, kv12_4=191.1)
        | _column("weights", kv24_8=14.65, kv16_8=34.50, kv12_4=95.4)
        | _column("transmla", kv24_8=7.63, kv16_8=10.48, kv12_4=76.4),
        init=METHODS,
        pairs={
            "50%": _pairs(paper="24+8", others="24+8"),
            "37.5%": _pairs(paper="16+8", others="16+8"),
            "25%": _pairs(paper="12+4", others="12+4"),
        },
        attended=False,
        calibration="text/stories260k_samples.json",
        calibration_part="0:80",
        calibration_tokens=(80 * 256,),
        bounds=_column("calibrated", kv50=4.20, kv37p5=5.4, kv25=17.0)
        | _column("refined", kv50=3.95, kv37p5=4.5, kv25=9.0),
        aims=_column("refined", kv50=3.75, kv37p5=4.1, kv25=6.0),
    ),
    "tinystories-gqa-calibrated": Preset(
        checkpoint="checkpoints/tinystories-gqa",
        text="text/valid.txt",
        window=512,
        num_windows=24,
        kv=("50%", "25%", "12.5%"),
        expected_source=15.04,
        expected=_column("paper", kv96_32=103.7, kv32_32=109.7, kv24_8=151.8)
        # on the beginning of the text, where this package takes windows from all of it: 16+16 (56.60) is not comparable
        | _column("transmla", kv64_64=16.65, kv32_32=22.09),
        init=METHODS,
        pairs={
            "50%": _pairs(paper="96+32", others="64+64"),
            "25%": _pairs(paper="32+32", others="32+32"),
            "12.5%": _pairs(paper="24+8", others="16+16"),
        },
        calibration="text/train.txt",
        calibration_tokens=(24 * 512,),
        refined_tokens=96 * 512,
        bounds=_column("calibrated", kv50=15.37, kv25=17.0, kv12p5=25.0)
        | _column("refined", kv50=15.18, kv25=15.7, kv12p5=17.7),
        aims=_column("refined", kv50=15.10, kv25=15.4, kv12p5=16.6),
    ),
    "tinystories-gqa-tokens": Preset(
        checkpoint="checkpoints/tinystories-gqa",
        text="text/valid.txt",
        window=512,
        num_windows=24,
        kv=("25%",),
        expected_source=15.04,
        init=("calibrated", "sampled"),
        calibration="text/train.txt",
        calibration_tokens=tuple(1024 * 2**power for power in range(7)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversion: what was asked for, what it became, how good it is."""

    init: str
    kv: str
    kv_share: float
    widths: str
    fidelity: Fidelity
    conversion_seconds: float
    calibration_tokens: int | None
    expected: float | None
    bound: float | None = None
    aim: float | None = None

    @property
    def deviation(self) -> float | None:
        """Relative difference of the perplexity from the expected one."""
        return None if self.expected is None else self.fidelity.perplexity / self.expected - 1

    def cells(self) -> list[Any]:
        """The row of the table."""
        found = self.fidelity
        measured = [found.perplexity_source, f"{found.gap:.4f}", f"{found.kl:.4f}", f"{found.top1:.1%}"]
        deviation = None if self.deviation is None else f"{self.deviation:+.2%}"
        return [
            f"{self.kv_share:.1%}",
            self.widths,
            self.init,
            self.calibration_tokens,
            found.perplexity,
            *measured,
            self.expected,
            deviation,
            self.bound,
            self.aim,
            f"{self.conversion_seconds:.1f}",
        ]


COLUMNS = (
    "KV",
    "rank + rope",
    "init",
    "tokens",
    "perplexity",
    "source",
    "gap (nats)",
    "KL (nats)",
    "top-1",
    "expected",
    "deviation",
    "at most",
    "aim",
    "convert (s)",
)


def kv_options(kv: str) -> dict[str, Any]:
    """Fields of ConvertOptions for a KV size: rank+rope as 24+8, or a share of the source's cache as 25%.

    Raises `OptionError` for anything else, and for shares where this version of the package takes none.
    """
    pair = re.fullmatch(r"(\d+)\+(\d+)", kv)
    if pair is not None:
        return {"rank": int(pair[1]), "rope_dim": int(pair[2])}
    if re.fullmatch(r"\d+(\.\d+)?%", kv) is None:
        raise OptionError(f"--kv: expected rank+rope such as 24+8 or a share such as 25%, found {kv!r}.")
    if "kv_size" not in ConvertOptions.names():
        raise OptionError(f"--kv: this version of xeco-convert has no KV budget yet, found {kv!r}; give rank+rope.")
    return {"kv_size": kv}


def read_windows(options: argparse.Namespace) -> torch.Tensor:
    """Token windows [W, T] of the text or the sequences that measure."""
    if options.ids is not None:
        sequences = json.loads(options.ids.read_text(encoding="utf-8"))
        return sequence_windows(sequences[parse_slice(options.part)], options.window, options.num_windows)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, local_files_only=True)
    return token_windows(options.text.read_text(encoding="utf-8"), tokenizer, options.window, options.num_windows)


def parse_slice(text: str) -> slice:
    """A slice written as in Python: 0:80, -80:, : and so on."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if match is None:
        raise OptionError(f"--part: expected a slice such as 0:80 or -80:, found {text!r}.")
    return slice(*(None if bound is None else int(bound) for bound in match.groups()))


def load(folder: Path, device: str) -> Any:
    """The model in float32, whatever it is stored in: what is compared is the weights, not the kernels' rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval()


def measure(
    source: Any, windows: torch.Tensor, init: str, kv: str, tokens: int | None, options: argparse.Namespace
) -> Row:
    """Convert, load, compare, forget."""
    size = options.pairs.get(kv, {}).get(init, kv)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        if init in BASELINES:
            model, facts = by_baseline(source, init, size, tokens, options, Path(folder))
        else:
            model, facts = by_package(init, size, tokens, options, Path(folder))
        fidelity = measure_fidelity(source, model, windows)
    return Row(
        init=init,
        kv=size,
        fidelity=fidelity,
        **facts,
        expected=options.expected.get((init, size)),
        bound=options.bounds.get((init, kv)),
        aim=options.aims.get((init, kv)),
    )


def by_package(
    init: str, kv: str, tokens: int | None, options: argparse.Namespace, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """The model that xeco_convert.convert makes, and the facts of a row."""
    fields: dict[str, Any] = {"init": "paper" if init == "paper" else "calibrated", **kv_options(kv)}
    if init != "paper":
        fields["refine"] = init == "refined"
        if tokens is not None:
            fields["calibration_tokens"] = tokens
        if init == "refined" and options.refine_steps is not None:
            fields["refine_steps"] = options.refine_steps
        if init != "sampled" and options.calibration is not None:
            fields["calibration"] = str(calibration_file(options, folder))
        fields |= options.fields
    report = convert(options.checkpoint, folder / "converted", **fields)
    facts = {"kv_share": report.kv_share, "widths": widths(report), "conversion_seconds": report.seconds}
    facts["calibration_tokens"] = report.summary.get("calibration_tokens")
    return load(folder / "converted", options.device), facts


def by_baseline(
    source: Any, init: str, kv: str, tokens: int | None, options: argparse.Namespace, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """The model that a baseline makes, and the facts of a row. Raises `OptionError` for a size that is no rank+rope."""
    fields = kv_options(kv)
    if "rank" not in fields:
        raise OptionError(f"{init}: expected rank+rope such as 24+8, found {kv!r}; it has no way to split a budget.")
    started, calibration = time.monotonic(), None
    if init != "weights" and options.calibration is not None:
        calibration = calibration_windows(calibration_file(options, folder), tokens, options.checkpoint)
    rank, rope = fields["rank"], fields["rope_dim"]
    model = baseline_model(init, source, options.checkpoint, (rank, rope), calibration, attended=options.attended)
    config = source.config
    facts = {
        "kv_share": (rank + rope) / (2 * config.num_key_value_heads * config.head_dim),
        "widths": f"{rank} + {rope}",
        "conversion_seconds": time.monotonic() - started,
        "calibration_tokens": None if calibration is None else calibration.num_tokens,
    }
    return model.to(options.device), facts


def calibration_file(options: argparse.Namespace, folder: Path) -> Path:
    """What calibrates: the text itself, or the part of a list of sequences, in a file of its own."""
    if options.calibration.suffix != ".json":
        return Path(options.calibration)
    sequences = json.loads(options.calibration.read_text(encoding="utf-8"))
    chosen = folder / "calibration.json"
    chosen.write_text(json.dumps(sequences[parse_slice(options.calibration_part)]), encoding="utf-8")
    return chosen


def calibration_windows(file: Path, tokens: int | None, checkpoint: Path) -> CalibrationWindows:
    """The windows that the package calibrates on."""
    num_tokens = tokens or CalibratedInitialisation().calibration_tokens
    return read_calibration(str(file), checkpoint, length=_CALIBRATION_WINDOW, num_tokens=num_tokens)


def widths(report: ConversionReport) -> str:
    """Rank + rope dim of the converted layers, as ranges where the layers differ."""
    converted = [layer for layer in report.layers if layer.kv_lora_rank is not None]
    return " + ".join(
        str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)}..{max(sizes)}"
        for sizes in (
            [layer.kv_lora_rank or 0 for layer in converted],
            [layer.qk_rope_head_dim or 0 for layer in converted],
        )
    )


def deviations(rows: Sequence[Row], expected_source: float | None) -> list[str]:
    """A sentence for each figure that differs from the expected one by more than the tolerance."""
    found = [
        f"{row.init} {row.kv}: {row.fidelity.perplexity:.4g}, expected {row.expected}"
        for row in rows
        if row.deviation is not None and not abs(row.deviation) <= TOLERANCE
    ]
    found += [
        f"{row.init} {row.kv}: {row.fidelity.perplexity:.4g}, expected at most {row.bound}"
        for row in rows
        if row.bound is not None and not row.fidelity.perplexity <= row.bound
    ]
    source = rows[0].fidelity.perplexity_source
    if expected_source is not None and not abs(source / expected_source - 1) <= TOLERANCE:
        found.append(f"source: {source:.4g}, expected {expected_source}")
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of a preset filled in where they are not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a table of results/fidelity.md, with its settings")
    parser.add_argument("--checkpoint", type=Path, help="folder of the source")
    parser.add_argument("--text", type=Path, help="text that measures, taken raw")
    parser.add_argument("--ids", type=Path, help="JSON list of token sequences that measure, instead of --text")
    parser.add_argument(
        "--part", help="sequences of --ids that measure, as a slice: 0:80, or --part=-80: for the last 80 [all]"
    )
    parser.add_argument("--window", type=int, help="tokens of a window")
    parser.add_argument("--num-windows", type=int, help="windows taken [all]")
    parser.add_argument("--init", nargs="+", choices=METHODS, help="ways to convert [the preset's, or paper]")
    parser.add_argument("--calibration", type=Path, help="text or JSON list of sequences to calibrate on [sampled]")
    parser.add_argument(
        "--calibration-part", default=":", help="sequences of a JSON --calibration that calibrate [all]"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, nargs="+", help="tokens to calibrate on [the package's default]"
    )
    parser.add_argument("--refined-tokens", type=int, help="the same where layers are refined [--calibration-tokens]")
    parser.add_argument("--refine-steps", type=int, help="refined: steps for each layer [the package's default]")
    parser.add_argument("--kv", nargs="+", help="KV sizes: rank+rope such as 24+8")
    parser.add_argument("--device", default="cpu", help="device of the measurement [cpu]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--work-dir", type=Path, help="folder for the converted models, removed afterwards [temporary]")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    options.expected, options.expected_source, options.bounds, options.aims = {}, None, {}, {}
    options.pairs, options.attended, options.fields = {}, True, {}
    if options.preset is not None:
        _fill_in(options, PRESETS[options.preset])
    options.part = options.part or ":"
    options.init = options.init or ["paper"]
    if options.checkpoint is None or options.kv is None or (options.text is None) == (options.ids is None):
        parser.error("give --preset, or --checkpoint, --kv and either --text or --ids")
    options.window = options.window or 512
    return options


def _fill_in(options: argparse.Namespace, preset: Preset) -> None:
    """Take from the preset what was not given; its figures hold only where the settings are its own."""
    shared = Path(os.environ.get("XECO_SHARED", _REPOSITORY.parent / "shared"))
    settings: dict[str, Any] = {"checkpoint": shared / preset.checkpoint, "part": preset.part}
    settings |= {"window": preset.window, "num_windows": preset.num_windows}
    settings |= {name: shared / path for name in ("text", "ids") if (path := getattr(preset, name)) is not None}
    given = [name for name in dict.fromkeys((*settings, "text", "ids")) if getattr(options, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise OptionError(f"--preset sets {flags} itself; leave one of the two out.")
    for name, value in settings.items():
        setattr(options, name, value)
    options.kv = options.kv or list(preset.kv)
    options.expected, options.expected_source = preset.expected, preset.expected_source
    options.init = options.init or list(preset.init)
    options.pairs, options.attended = preset.pairs, preset.attended
    options.bounds, options.aims = preset.bounds, preset.aims
    if preset.calibration is not None and options.calibration is None:
        options.calibration, options.calibration_part = shared / preset.calibration, preset.calibration_part
        options.calibration_tokens = options.calibration_tokens or preset.calibration_tokens
        options.refined_tokens = options.refined_tokens or preset.refined_tokens


def cases(options: argparse.Namespace) -> list[tuple[str, str, int | None]]:
    """(method, KV size, calibration tokens) of every row; what does not calibrate is there once."""
    sizes = list(options.calibration_tokens or [None])
    found = []
    for kv in options.kv:
        for init in options.init:
            calibrates = init not in ("paper", "weights")
            for tokens in sizes if calibrates else [None]:
                found.append((init, kv, options.refined_tokens or tokens if init == "refined" else tokens))
    return list(dict.fromkeys(found))


def run(options: argparse.Namespace) -> int:
    """Measure every pair of init and KV size, print the table, write the JSON; the exit code."""
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    machine = machine_facts()
    windows = read_windows(options)
    source = load(options.checkpoint, options.device)
    rows = [measure(source, windows, *case, options) for case in cases(options)]
    print(f"{options.checkpoint}: {windows.shape[0]} windows of {windows.shape[1]} tokens; {describe(machine)}")
    print(format_table(COLUMNS, [row.cells() for row in rows]))
    wrong = deviations(rows, options.expected_source)
    for sentence in wrong:
        print(f"not as expected: {sentence}")
    write_json(
        options.json,
        {
            "benchmark": "fidelity",
            "machine": machine,
            "settings": _settings(options),
            "expected_source": options.expected_source,
            "rows": [asdict(row) | {"gap": row.fidelity.gap, "deviation": row.deviation} for row in rows],
            "deviating": wrong,
        },
    )
    return 1 if wrong else 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("preset", "checkpoint", "text", "ids", "part", "window", "num_windows", "init", "kv", "device", "threads")
    names += ("calibration", "calibration_part", "calibration_tokens", "refined_tokens", "refine_steps")
    values = {name: getattr(options, name) for name in names}
    # The folder's place differs from machine to machine, its name says which it is.
    return {name: value.name if isinstance(value, Path) else value for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; a foreseen failure is one sentence."""
    try:
        return run(parse_arguments(arguments))
    except XecoError as error:
        print(f"bench_fidelity: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
