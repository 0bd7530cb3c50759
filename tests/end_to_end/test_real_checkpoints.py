"""Real checkpoints through the installed command: perplexity as published here, files, table, report, inspect."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import Converted, Runner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """exp of the mean loss over all but the first token of each window, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@pytest.fixture(scope="module")
def stories_windows(shared: Path) -> torch.Tensor:
    """The last 80 of 160 sequences of 256 tokens that the source sampled."""
    samples = json.loads((shared / "text" / "stories260k_samples.json").read_text())
    rows = samples["sequences"] if isinstance(samples, dict) else samples
    return torch.tensor(rows)[80:]


@pytest.fixture(scope="module")
def tinystories_windows(shared: Path, tinystories: Path) -> torch.Tensor:
    """24 windows of 512 tokens of valid.txt, without special tokens."""
    text = (shared / "text" / "valid.txt").read_text()
    ids = AutoTokenizer.from_pretrained(tinystories)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: 24 * 512].view(24, 512)


def test_stories260k_has_the_perplexity_of_the_published_method(
    stories_converted: Converted, stories_windows: torch.Tensor
) -> None:
    assert perplexity(stories_converted.source, stories_windows) == pytest.approx(3.53, rel=0.02)
    assert perplexity(stories_converted.output, stories_windows) == pytest.approx(147.4, rel=0.05)


def test_tinystories_has_the_perplexity_of_the_published_method(
    tinystories_converted: Converted, tinystories_windows: torch.Tensor
) -> None:
    assert perplexity(tinystories_converted.source, tinystories_windows) == pytest.approx(15.04, rel=0.02)
    assert perplexity(tinystories_converted.output, tinystories_windows) == pytest.approx(103.7, rel=0.05)


def test_the_table_shows_every_layer_and_the_sizes(stories_converted: Converted) -> None:
    lines = stories_converted.stdout.splitlines()
    for word in ("layer", "kv_lora_rank", "rope dim", "key error", "value error", "exactness error", "output error"):
        assert word in lines[0]
    rows = [line.split() for line in lines[1:6]]
    assert [row[:3] for row in rows] == [[str(layer), "24", "8"] for layer in range(5)]
    assert all(row[5:7] == ["256", "128"] for row in rows)
    assert lines[6] == "KV cache: 1280 -> 640 bytes per token (50.0%)"
    assert lines[7].startswith("path to the logits, attention set aside: differs by 0.0000")
    assert lines[8].startswith("parameters: 260,032 -> ")
    assert "written in" in lines[9] and "peak memory" in lines[9]


def test_the_plan_and_the_progress_are_on_stderr(stories_converted: Converted) -> None:
    assert "llama, 5 layers, hidden_size 64, 8 heads in 4 key/value groups of head_dim 8" in stories_converted.stderr
    assert "kv_lora_rank 24, qk_rope_head_dim 8, qk_nope_head_dim 0" in stories_converted.stderr
    assert "100%" in stories_converted.stderr and "ETA" in stories_converted.stderr
    assert "Traceback" not in stories_converted.stderr and "Warning" not in stories_converted.stderr


def test_verification_finds_the_source_understood(stories_converted: Converted) -> None:
    checked = [layer for layer in stories_converted.report["layers"] if layer["exactness_error"] is not None]
    assert [layer["layer"] for layer in checked] == [0, 2, 4]
    assert all(layer["exactness_error"] < 1e-5 < layer["output_error"] for layer in checked)


def test_the_report_counts_bytes_and_parameters(tinystories_converted: Converted) -> None:
    report = tinystories_converted.report
    assert report["kv_bytes_before"] == 5 * 256 * 2 and report["kv_bytes_after"] == 5 * 128 * 2
    assert report["kv_share"] == 0.5
    assert report["dtype"] == "BF16" and report["model_type"] == "xeco_llama"
    model = AutoModelForCausalLM.from_pretrained(tinystories_converted.output)
    assert report["parameters_after"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(0 < layer["value_error"] < 1 and 0 < layer["key_error"] < 1.5 for layer in report["layers"])
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 10**7


def test_shards_have_an_index_and_the_dtype_of_the_source(tinystories_converted: Converted) -> None:
    files = sorted(tinystories_converted.output.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 2.1e6 for file in files)
    index = json.loads((tinystories_converted.output / "model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert {handle.get_slice(name).get_dtype() for name in handle.keys()} == {"BF16"}  # noqa: SIM118
            assert handle.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file.name for name in handle.keys())  # noqa: SIM118


def test_everything_beside_the_weights_comes_along(tinystories_converted: Converted) -> None:
    source, output = tinystories_converted.source, tinystories_converted.output
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    card = (output / "README.md").read_text()
    assert card.startswith("---\n") and "| KV cache, bytes per token | 2560 | 1280 (50.0%) |" in card
    assert json.loads((output / "config.json").read_text())["model_type"] == "xeco_llama"


def test_tied_embeddings_stay_tied(stories_converted: Converted) -> None:
    with safe_open(stories_converted.output / "model.safetensors", framework="pt") as handle:
        assert "lm_head.weight" not in handle.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(stories_converted.output)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_converted_model_writes_text(tinystories_converted: Converted) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories_converted.output)
    model = AutoModelForCausalLM.from_pretrained(tinystories_converted.output)
    inputs = tokenizer("once upon a time", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert len(tokenizer.decode(output[0], skip_special_tokens=True)) > len("once upon a time") + 20


def test_inspect_shows_source_layers_and_cache(run: Runner, stories_converted: Converted) -> None:
    done = run("xeco-convert", "inspect", stories_converted.output)
    lines = done.stdout.splitlines()
    assert "xeco_llama, paper from" in lines[0] and str(stories_converted.source) in lines[0]
    assert [line.split()[:4] for line in lines[2:7]] == [[str(layer), "24", "8", "0"] for layer in range(5)]
    assert lines[7] == "KV cache: 640 bytes per token, the source's 1280: 50.0%"


def test_inspect_gives_json(run: Runner, tinystories_converted: Converted) -> None:
    found = json.loads(run("xeco-convert", "inspect", tinystories_converted.output, "--json").stdout)
    assert found["kv_bytes_before"] == 2560 and found["kv_bytes_after"] == 1280
    assert [layer["kv_lora_rank"] for layer in found["layers"]] == [96] * 5
    expected = [layer["key_error"] for layer in tinystories_converted.report["layers"]]
    assert [layer["key_error"] for layer in found["layers"]] == expected


def test_the_same_input_gives_the_same_bytes(run: Runner, stories_converted: Converted, tmp_path: Path) -> None:
    run(
        "xeco-convert",
        stories_converted.source,
        tmp_path / "again",
        "--init",
        "paper",
        "--rank",
        24,
        "--rope-dim",
        8,
        "--verify",
        "--quiet",
    )
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (stories_converted.output, tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    assert "xeco_report.json" in digests[0]


def test_distill_says_what_it_will_do(run: Runner, stories_converted: Converted) -> None:
    done = run("xeco-distill", stories_converted.output, "--dry-run")
    assert "KV cache 50.0% of the source's" in done.stdout
    assert f"teacher: {stories_converted.source} (the source)" in done.stdout
    assert "stages: layers, kl" in done.stdout and "memory: about" in done.stdout


def test_distill_heals_with_nothing_but_a_budget(run: Runner, stories_converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stories_converted.output, out)
    quick = ("--budget-tokens", 8192, "--seq-length", 128, "--layer-steps", 15, "--layer-tokens", 4096)
    done = run("xeco-distill", out, *quick, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["kl"] < 0.5 * report["before"]["kl"]
    assert "KL from the teacher" in done.stdout and "ETA" in done.stderr
    assert (tmp_path / "out.before-healing" / "model.safetensors").is_file()
    inspected = run("xeco-convert", "inspect", out)
    assert "50.0%" in inspected.stdout
    again = run("xeco-distill", "eval", out, "--tokens", 2048, "--seq-length", 128, "--needle", "--contexts", "64,128")
    assert "Needle in a haystack" in again.stdout and "## Evaluation" in (out / "README.md").read_text()
