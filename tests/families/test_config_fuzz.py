"""Odd values in every field of config.json and of the files beside it: a plan, a conversion, or one sentence; never a traceback.

Values come from a table, of which every family tries a fixed share (how many cases that is, and how many were accepted, is
printed: `pytest -s`), and from hypothesis, which nests them. Nothing is drawn anew from one run to the next.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCABULARY, build_checkpoint, source_config, write_json
from fresh import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.cli import main
from xeco_convert.errors import XecoError
from xeco_convert.export.engines import ENGINES
from xeco_convert.export.formats.deepseek_v3.layout import make_layout
from xeco_convert.families import supported_model_types
from xeco_convert.inspect_checkpoint import inspect_checkpoint
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan
from xeco_convert.pretrained import load_causal_lm, read_config
from xeco_distill.options import DistillOptions
from xeco_distill.plan import Sizes, make_healing_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]

# The variant of tests/builders.py that stands for a family, where it has another name.
VARIANT_OF = {"gemma3_text": "gemma3", "phi3": "phi3_partial"}
FAMILIES = list(supported_model_types())
DEEP: Any = "x"
for _ in range(60):
    DEEP = {"x": [DEEP]}

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    10**18,
    10**400,
    0.5,
    512.0,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "8",
    "\ud800",
    "x" * 100_000,
    "a\nb",
    [],
    [0],
    [None] * 3,
    ["full_attention"] * 7,
    [float("nan"), "x"],
    {},
    {"x": 1},
    {"0": "x"},
    DEEP,
    {"rope_type": None},
    {"type": "su"},
    {"rope_type": "yarn", "factor": "x"},
    {"rope_type": ["x"]},
)
# Fields of older files, of other classes, and of all classes of transformers.
OTHER_FIELDS = (
    "rope_scaling",
    "rope_theta",
    "rotary_pct",
    "rotary_emb_base",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "torch_dtype",
    "head_dim",
    "layer_types",
    "no_rope_layers",
    "sliding_window_pattern",
    "quantization_config",
    "auto_map",
    "architectures",
    "text_config",
    "vision_config",
    "is_encoder_decoder",
    "num_labels",
    "id2label",
    "attn_implementation",
    "_attn_implementation",
    "return_dict",
    "use_return_dict",
    "num_layers",
    "n_layer",
)
# One case in so many is tried in the plan, and one in so many of those that it accepts in a conversion. Like all steps through
# fields × values below, prime to the number of values: every one of them comes up.
SHARE = 17
CONVERTED_SHARE = 37


def fields_of(family: str) -> list[str]:
    """Every field of the family's class, and those of older files."""
    raw = source_config(VARIANT_OF.get(family, family))
    return sorted({*type(AutoConfig.for_model(family))().to_dict(), *OTHER_FIELDS, *raw})


def cases(family: str) -> Iterator[tuple[str, Any]]:
    """The family's share of fields × values."""
    everything = [(field, value) for field in fields_of(family) for value in VALUES]
    return iter(everything[FAMILIES.index(family) % SHARE :: SHARE])


@cache
def index_of(folder: Path, family: str) -> CheckpointIndex:
    return CheckpointIndex.open(build_checkpoint(folder / family, VARIANT_OF.get(family, family), tokenizer=True))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CheckpointIndex]:
    folder = tmp_path_factory.mktemp("sources")
    return lambda family: index_of(folder, family)


def accepted(do: Callable[[], Any]) -> bool:
    """Whether it ends in a result; otherwise in a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            do()
    except XecoError as error:
        sentence = str(error)
        assert sentence.endswith(".") and len(sentence) < 2500 and sentence.replace("…", "").isprintable(), sentence
        return False
    return True


def changed(index: CheckpointIndex, field: str, value: Any) -> CheckpointIndex:
    return dataclasses.replace(index, config={**index.config, field: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_odd_value_ends_in_a_plan_or_in_a_sentence(
    family: str, sources: Callable[[str], CheckpointIndex], tmp_path: Path
) -> None:
    """Fields × values, a share of them; of what the plan accepts, a smaller share is converted and loaded."""
    index = sources(family)
    planned = [case for case in cases(family) if accepted(lambda case=case: plan(changed(index, *case)))]
    converted = planned[::CONVERTED_SHARE]
    whole = sum(accepted(lambda case=case: convert_and_load(index.folder, tmp_path, *case)) for case in converted)
    count = len(fields_of(family)) * len(VALUES)
    print(f"\n{family}: {len(fields_of(family))} fields × {len(VALUES)} values = {count}, of which", end=" ")
    print(f"{len(list(cases(family)))} planned, {len(planned)} accepted, {len(converted)} converted, {whole} whole")
    assert converted and whole


def plan(index: CheckpointIndex) -> Any:
    return make_plan(index, ConvertOptions(rank=8))


def convert_and_load(source: Path, work: Path, field: str, value: Any) -> None:
    """What a user does with a configuration that --dry-run accepts."""
    folder, output = work / "odd", work / "out"
    for old in (folder, output):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    xeco_convert.convert(
        folder, output, rank=8, rope_dim=4, calibration=tokens(work), calibration_tokens=1024, verify=True
    )
    inspect_checkpoint(output)
    assert load_causal_lm(output, torch.float32)(torch.tensor([[3, 4, 5]])).logits.shape[1] == 3


def tokens(folder: Path) -> str:
    file = folder / "tokens.json"
    if not file.is_file():
        generator = torch.Generator().manual_seed(7)
        write_json(file, torch.randint(3, VOCABULARY, (28, 40), generator=generator).tolist())
    return str(file)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
ROPE = st.dictionaries(
    st.sampled_from(
        ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "long_factor", "short_factor")
    ),
    st.sampled_from(("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su")) | JUNK,
)


@given(data=st.data())
@settings(derandomize=True, max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_junk_of_any_shape_ends_in_a_plan_or_in_a_sentence(
    sources: Callable[[str], CheckpointIndex], data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    fields = data.draw(st.dictionaries(st.sampled_from(fields_of(family)), JUNK, min_size=1, max_size=3))
    if data.draw(st.booleans()):
        fields[data.draw(st.sampled_from(("rope_parameters", "rope_scaling")))] = data.draw(ROPE)
    index = sources(family)
    accepted(lambda: plan(dataclasses.replace(index, config={**index.config, **fields})))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint that could be exported; not to be changed by tests."""
    work = tmp_path_factory.mktemp("converted")
    source = build_checkpoint(work / "source", "llama", tokenizer=True)
    xeco_convert.convert(source, work / "out", rank=8, portable=True, calibration=tokens(work), calibration_tokens=1024)
    return work / "out"


def copy_with(output: Path, folder: Path, file: str, content: Any) -> Path:
    """The converted folder again, of links, with another content of one file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for one in output.iterdir():
        if one.name != file:
            (folder / one.name).symlink_to(one)
    (folder / file).write_text(json.dumps(content))
    return folder


def uses(folder: Path) -> dict[str, Callable[[], Any]]:
    """All that reads a converted folder before it computes anything."""

    def layout() -> Any:
        index = CheckpointIndex.open(folder)
        values = read_config(index.config).to_dict()
        return make_layout(
            values, supported_model_types()["llama"], ENGINES.find("transformers", "--target"), index.headers
        )

    return {
        "inspect": lambda: inspect_checkpoint(folder),
        "export": layout,
        "load": lambda: load_causal_lm(folder, torch.float32),
        "heal": lambda: Sizes.of(make_healing_plan(folder, DistillOptions())),
    }


def nested(content: Mapping[str, Any], places: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    """The content with every value in turn at every place."""
    for name, path in places.items():
        for value in VALUES:
            copy = json.loads(json.dumps(content))
            inner = copy
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
            yield f"{name} = {str(value)[:40]!r}", copy


@pytest.mark.parametrize("use", ["inspect", "export", "load", "heal"])
def test_an_odd_value_in_a_converted_folder_is_a_sentence(use: str, output: Path, tmp_path: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    places: dict[str, tuple[Any, ...]] = {
        name: (name,) for name in ("mla_layers", "conversion", "auto_map", "model_type")
    }
    places |= {name: (name,) for name in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "dtype")}
    places |= {f"conversion.{name}": ("conversion", name) for name in config["conversion"]}
    places |= {f"source.{name}": ("conversion", "source", name) for name in ("path", "revision", "model_type")}
    places |= {"a layer": ("mla_layers", 1)} | {
        f"layer {key}": ("mla_layers", 1, key) for key in config["mla_layers"][1]
    }
    tried = whole = 0
    for number, (_, content) in enumerate(nested(config, places)):
        if number % (17 if use in ("load", "heal") else 5):  # each is a folder of its own
            continue
        tried += 1
        whole += accepted(uses(copy_with(output, tmp_path / "odd", "config.json", content))[use])
    print(f"\n{use}: {len(places)} places × {len(VALUES)} values, {tried} tried, {whole} accepted")
    assert 0 < whole < tried


@pytest.mark.parametrize("use", ["inspect", "heal"])
def test_an_odd_report_is_a_sentence(use: str, output: Path, tmp_path: Path) -> None:
    report = json.loads((output / "xeco_report.json").read_text())
    places: dict[str, tuple[Any, ...]] = {name: (name,) for name in report}
    places |= {f"row {name}": ("layers", 0, name) for name in report["layers"][0]} | {"a row": ("layers", 0)}
    for _, content in list(nested(report, places))[:: 17 if use == "heal" else 11]:
        accepted(uses(copy_with(output, tmp_path / "odd", "xeco_report.json", content))[use])


def test_an_odd_generation_config_is_a_sentence(sources: Callable[[str], CheckpointIndex], tmp_path: Path) -> None:
    content = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.40.0"}
    names = (*content, "temperature", "top_k", "max_length", "max_new_tokens", "do_sample", "cache_implementation")
    for number, (_, odd) in enumerate(nested(content, {name: (name,) for name in names})):
        if number % 5 == 0:
            folder = copy_with(sources("llama").folder, tmp_path / "odd", "generation_config.json", odd)
            accepted(lambda folder=folder: load_causal_lm(folder, torch.float32))


def test_an_odd_index_is_a_sentence(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", num_shards=2, tokenizer=True)
    name = "model.safetensors.index.json"
    content = json.loads((source / name).read_text())
    tensor = next(iter(content["weight_map"]))
    places = {"metadata": ("metadata",), "size": ("metadata", "total_size"), "map": ("weight_map",)}
    kept = 0
    cases = nested(content, {**places, "file": ("weight_map", tensor), "unknown": ("weight_map", "x")})
    for number, (_, odd) in enumerate(cases):
        folder = copy_with(source, tmp_path / "odd", name, odd)
        if accepted(lambda folder=folder: plan(CheckpointIndex.open(folder))) and number % 5 == 0:
            kept += accepted(lambda folder=folder: load_causal_lm(folder, torch.float32))
    assert kept  # what stands in metadata is of no importance


COMMANDS = {
    "architectures": 7,
    "rope_scaling": {"type": "su", "factor": 2.0},
    "quantization_config": {},
    "output_hidden_states": {"x": 1},
}
REFUSED = ("rope_scaling",)
IN_PROCESSES = ("architectures", "rope_scaling")  # one of each end


@pytest.mark.parametrize("field", COMMANDS)
def test_the_command_prints_no_traceback(
    field: str, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, where a traceback would be this test's; the first that is refused and the first that is not in
    processes of their own, with all that they print."""
    folder = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: COMMANDS[field]}))
    options = ["--rank", "8", "--calibration", tokens(tmp_path), "--calibration-tokens", "1024", "--quiet"]
    if field in IN_PROCESSES:
        done = run_command("xeco-convert", folder, tmp_path / "out", *options)
        code, error = done.returncode, done.stderr
    else:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(folder), str(tmp_path / "out"), *options])
        code, error = int(ended.value.code or 0), capfd.readouterr().err
    assert "Traceback" not in error
    assert (code == 0) is (tmp_path / "out").is_dir() is (field not in REFUSED)
    assert code == 0 or (code == 1 and len(error.strip().splitlines()) == 1)
