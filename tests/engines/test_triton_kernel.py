"""vLLM's decode kernel for GPUs, run by Triton's interpreter at widths of converted layers: no GPU is needed for that.

The interpreter computes what the kernel says, and checks shapes. It knows neither the least tile of a matrix product nor shared
memory.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xeco_convert.modeling import MlaLayer
from xeco_convert.vllm.support import kernel_obstacle

pytest.importorskip("triton")

# vLLM takes Triton for absent where there is no GPU, so the kernel's file is read past it.
PROGRAM = """
import sys, torch
source = open(sys.argv[1]).read()
source = source.replace("from vllm.triton_utils import tl, triton", "import triton, triton.language as tl")
source = source.replace("is_hip_ = current_platform.is_rocm()", "is_hip_ = False")
open(sys.argv[2], "w").write(source)
sys.path.insert(0, sys.argv[2].rpartition("/")[0])
from kernel import decode_attention_fwd
rank, rope = int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
lengths, table = torch.tensor([37, 5], dtype=torch.int32), torch.tensor([[3, 1, 5], [0, 2, 4]], dtype=torch.int32)
queries, cache = torch.randn(2, 5, rank + rope).half(), torch.randn(6, 16, 1, rank + rope).half()
out, lse, scratch = torch.zeros(2, 5, rank).half(), torch.zeros(2, 5).half(), torch.empty(2, 5, 2, rank + 1)
one = torch.ones(1)
arguments = (queries, cache, cache[..., :rank], out, lse, table, lengths, scratch, 2, 0.1, 16)
decode_attention_fwd(*arguments, k_scale=one, v_scale=one, is_mla=True)
for row in range(2):
    rows = cache[table[row].long()].flatten(0, 1)[: lengths[row], 0].double()
    expected = (queries[row].double() @ rows.T * 0.1).softmax(-1) @ rows[:, :rank]
    assert (out[row].double() - expected).abs().max() < 4e-3, (rank, rope)  # observed: 0.9e-3 at most
"""


def run(folder: Path, rank: int, rope: int) -> subprocess.CompletedProcess[str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "v1" / "attention" / "ops" / "triton_decode_attention.py"
    command = [sys.executable, "-c", PROGRAM, str(file), str(folder / "kernel.py"), str(rank), str(rope)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def obstacle(rank: int, rope: int) -> str | None:
    return kernel_obstacle(MlaLayer(kv_lora_rank=rank, qk_nope_head_dim=64, qk_rope_head_dim=rope, v_head_dim=64))


@pytest.mark.parametrize(("rank", "rope"), [(48, 24), (88, 40), (130, 16), (64, 0), (256, 32), (448, 128), (600, 40)])
def test_the_kernel_is_right_at_widths_that_are_let_through(rank: int, rope: int, tmp_path: Path) -> None:
    assert obstacle(rank, rope) is None
    done = run(tmp_path, rank, rope)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("rank", "rope"), [(536, 40), (264, 24), (128, 160)])
def test_widths_that_it_does_not_take_are_refused(rank: int, rope: int, tmp_path: Path) -> None:
    assert obstacle(rank, rope) is not None
    assert "incompatible dimensions" in run(tmp_path, rank, rope).stderr
