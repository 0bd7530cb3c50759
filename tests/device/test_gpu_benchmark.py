"""The GPU benchmark compares like with like: all of its implementations are one function, shown here on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_gpu_attention as bench
import bench_gpu_choice
import gpu_attention_peers as peers
import gpu_generate
from gpu_generate import GenerateCase, converted_config, random_model, source_config
from random_checkpoint import SHAPES, write_checkpoint
from transformers import AutoModelForCausalLM

from xeco_convert import convert

FORWARD = peers.GpuCase(batch=2, queries=64, tokens=64, rank=32, rope=16, heads=3, nope=16)
DECODE = peers.GpuCase(batch=2, queries=1, tokens=128, rank=32, rope=16, heads=3, nope=16)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    error = (one.float() - other.float()).norm() / other.float().norm()
    assert error < 0.03, float(error)


@pytest.mark.parametrize("peer", [peers.expanded_sdpa, peers.absorbed_sdpa, peers.flex])
def test_a_training_step_computes_the_same_in_every_implementation(peer, monkeypatch: pytest.MonkeyPatch) -> None:
    if peer is peers.flex:
        from torch.nn.attention import flex_attention

        monkeypatch.setattr(peers, "_compiled_flex", lambda: flex_attention.flex_attention)
    layer = peers.Layer(FORWARD, training=peer is not peers.flex, device="cpu")
    assert_same(peer(layer).detach(), peers.fused(layer).detach())


@torch.no_grad()
def test_a_decode_step_computes_the_same_in_every_implementation() -> None:
    layer = peers.Layer(DECODE, device="cpu")
    ours = peers.decode_fused(layer)()
    assert_same(peers.decode_paged(layer)(), ours)
    assert_same(peers.decode_decompressed(layer)()[..., : DECODE.nope].transpose(1, 2), layer.output(ours))
    packed, same = peers.decode_packed(layer, (4, 8))
    assert_same(packed(), same())
    assert_same(peers.decode_packed(layer, (8, 8))[1](), ours)


def test_work_and_bytes_are_counted_from_the_sizes() -> None:
    assert FORWARD.flop == 2 * (2 * 32 + 16) * 3 * 2 * (64 * 65 // 2)
    assert DECODE.cache_bytes == 2 * 128 * (32 + 16) * 2
    assert DECODE.code_bytes((4, 8)) == 2 * 128 * (16 + 2 + 16 + 2)


class StillClock:
    """Runs once and says that it took a millisecond for each time it was asked."""

    calls = 0

    def seconds(self, run) -> float:
        run()
        self.calls += 1
        return self.calls / 1000


@pytest.mark.parametrize("training", [True, False])
def test_the_speed_of_the_kernels_is_that_of_counted_work(training: bool) -> None:
    row = bench_gpu_choice.compare(FORWARD, training=training, clock=StillClock(), device="cpu")
    assert row["ms"] == {"fused": 1.0, "expanded": 2.0, "absorbed": 3.0}
    pairs, tokens, width = 64 * 65 // 2, 64, 16 + 16
    over_latents = 2 * (2 * 32 + 16) * pairs + 2 * 32 * width * tokens
    expanded = 2 * (width + 16) * pairs + 2 * 32 * width * tokens
    assert row["speed"] == pytest.approx(2 * over_latents / expanded)


CEILINGS = {"copy_gb_per_second": 1.0, "bf16_tflop_per_second": 1.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's cases, as small as the tests', on the CPU."""
    for name, value in {"DECODE": [DECODE], "DECOMPRESSED": DECODE, "FORWARD": FORWARD}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "Layer", lambda case, **how: peers.Layer(case, device="cpu", **how))
    monkeypatch.setattr(bench, "flex", peers.fused)  # compiled, and without gradients on the CPU


@pytest.mark.usefixtures("small")
def test_every_case_becomes_a_line_of_the_table() -> None:
    results: dict = {"cases": [], "failures": []}
    parts = (bench.decode_rows, bench.decompressed_rows, bench.forward_rows, bench.training_rows, bench.code_rows)
    for measure in parts:
        bench.collect(measure, results, StillClock(), CEILINGS)
    assert results["failures"] == []
    assert [line["unit"] for line in results["cases"]] == [
        "GB/s",
        "GB/s",
        "x",
        "TFLOP/s",
        "x",
        *["GB/s"] * len(bench.CODES),
    ]
    assert results["cases"][0]["figure"] == DECODE.cache_bytes / 1e6
    assert results["cases"][2]["share"] == 2.0 and results["cases"][4]["share"] == 2.0
    of_codes = results["cases"][5]
    assert of_codes["figure"] == DECODE.code_bytes((8, 8)) / 2e6 and of_codes["share"] == 0.5


@pytest.mark.usefixtures("small")
def test_a_peer_that_does_not_run_is_left_out_and_one_that_disagrees_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(layer: peers.Layer) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    results: dict = {"cases": [], "failures": []}
    monkeypatch.setattr(bench, "flex", refuse)
    bench.collect(bench.training_rows, results, StillClock(), CEILINGS)
    assert "FlexAttention does not run (RuntimeError)" in results["cases"][0]["against"] and not results["failures"]
    monkeypatch.setattr(bench, "expanded_sdpa", lambda layer: 2 * peers.fused(layer))
    bench.collect(bench.training_rows, results, StillClock(), CEILINGS)
    assert "training_rows: ValueError: " in results["failures"][0] and "disagree" in results["failures"][0]
    monkeypatch.setattr(bench, "expanded_sdpa", refuse)
    bench.collect(bench.training_rows, results, StillClock(), CEILINGS)
    assert "expanded K/V in flash attention does not run" in results["failures"][1] and len(results["cases"]) == 1


# generate

_TINY = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_attention_heads": 8, "head_dim": 16}
SHAPE = {**SHAPES["llama-3.1-8b"], **_TINY, "num_key_value_heads": 2, "num_hidden_layers": 4}
GENERATE = GenerateCase(shape=SHAPE, batch=3, context=40, rank=16, rope=8, new_tokens=2, repeats=1)


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.state_dict().items()}


def test_both_models_are_those_that_a_conversion_reads_and_writes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SHAPE, 2)
    convert(tmp_path / "source", tmp_path / "converted", init="paper", rank=16, rope_dim=8)
    for kind, config in (("source", source_config), ("converted", converted_config)):
        result, expected = (
            random_model(config(GENERATE, 2), "cpu"),
            AutoModelForCausalLM.from_pretrained(tmp_path / kind),
        )
        assert type(result) is type(expected) and shapes_of(result) == shapes_of(expected)
        assert result.dtype == torch.bfloat16
        if kind == "converted":
            assert result.config.mla_layers == expected.config.mla_layers


def test_generate_is_compared_from_full_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    crop = gpu_generate.DynamicCache.crop

    def watched(cache: gpu_generate.DynamicCache, length: int) -> None:
        lengths.append((cache.get_seq_length(), length))
        crop(cache, length)

    monkeypatch.setattr(gpu_generate.DynamicCache, "crop", watched)
    row = gpu_generate.compare(GENERATE, 2, "cpu")
    # the last token that is generated is not cached; the prompt's last one is not there beforehand
    assert lengths == 2 * [(42, -2)]
    assert row["case"] == "generate, 2 of 4 layers, B 3, T 40, R 16+8" and row["share"] > 0
    assert set(row) == {"case", "ms", "figure", "unit", "against", "share", "at least"}


def test_as_many_layers_are_made_as_the_gpu_holds() -> None:
    case = GenerateCase(shape=SHAPES["llama-3.1-8b"])
    assert case.layer_bytes == 436207616 + 2147483648
    assert case.layers_that_fit(80 * 10**9) == 23
    assert case.layers_that_fit(140 * 10**9) == 32
    assert case.layers_that_fit(10**9) == 1
