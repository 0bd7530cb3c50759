"""The GPU benchmark compares like with like: all of its implementations are one function, shown here on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_attention_peers as peers

FORWARD = peers.GpuCase(batch=2, queries=64, tokens=64, rank=32, rope=16, heads=3, nope=16)
DECODE = peers.GpuCase(batch=2, queries=1, tokens=128, rank=32, rope=16, heads=3, nope=16)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    error = (one.float() - other.float()).norm() / other.float().norm()
    assert error < 0.03, float(error)


@pytest.mark.parametrize("peer", [peers.expanded_sdpa, peers.flex])
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


def test_work_and_bytes_are_counted_from_the_sizes() -> None:
    assert FORWARD.flop == 2 * (2 * 32 + 16) * 3 * 2 * (64 * 65 // 2)
    assert DECODE.cache_bytes == 2 * 128 * (32 + 16) * 2
