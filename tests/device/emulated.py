"""The device kernels on a host that plays a GPU: the sources of csrc/, every thread a fiber (emulation.h).

Two machines: "mma" has warps of 32 lanes with mma.sync and ldmatrix (CUDA), "mfma" waves of 64 lanes (HIP).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xeco_convert.modeling.layer_xeco import row_bytes
from xeco_convert.ops.packed_rows import Bits, layout_number

ROOT = Path(__file__).resolve().parents[2]
LANES = {"mma": 32, "mfma": 64}
_HERE = Path(__file__).parent
_KERNELS = sorted((ROOT / "csrc").glob("*/gpu/instantiate/*.cu"))
_SOURCES = [_HERE / "machine.cpp", _HERE / "emulated.cpp"]


def build(machine: str, folder: Path) -> ctypes.CDLL:
    """Compile the kernels for one of the machines, where `folder` has them not yet, and load them."""
    library = folder / f"{machine}.so"
    if not library.exists():
        _compile(machine, library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_lanes.restype = loaded.stages_of_block.restype = ctypes.c_int64
    loaded.blocks_of_forward.restype = ctypes.c_int64
    loaded.emulated_schedule.argtypes = [ctypes.c_int64, ctypes.c_int64]
    loaded.emulated_barriers.restype = ctypes.c_int64
    loaded.emulated_barriers.argtypes = [ctypes.c_int64]
    loaded.widened.restype = ctypes.c_float
    loaded.widened.argtypes = [ctypes.c_int64, ctypes.c_int64]
    loaded.rounded.restype = ctypes.c_int64
    loaded.rounded.argtypes = [ctypes.c_int64, ctypes.c_float]
    return loaded


def _compile(machine: str, library: Path) -> None:
    compiler = compiler_of_host()
    assert compiler is not None
    # -Og: compiled in two thirds of -O1's time, while the tests take a tenth longer, which is less
    flags = ["-std=c++17", "-Og", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *emulation_flags(machine)]
    # a misaligned access or an index that does not fit its type ends the program, as a GPU would or should
    flags += ["-fsanitize=alignment,signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"]
    kernels = library.with_suffix(".cpp")  # all in one: their headers are read once
    kernels.write_text("".join(f'#include "{file}"\n' for file in _KERNELS), "utf-8")
    subprocess.run([*compiler, *flags, "-x", "c++", *map(str, [kernels, *_SOURCES]), "-o", str(library)], check=True)


def compiler_of_host() -> list[str] | None:
    """The command of the C++ compiler, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def emulation_flags(machine: str) -> list[str]:
    """What makes a compiler of the host take device code for one of the machines."""
    # "#pragma unroll" is for the vendors' compilers
    macros = ["-Wno-unknown-pragmas", f"-DXECO_EMULATE_LANES={LANES[machine]}", "-DXECO_GPU_MACHINE=<emulation.h>"]
    return [*macros, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", f"-I{_HERE}"]


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Shape(ctypes.Structure):
    _names = (
        "float16 batch num_queries num_tokens num_heads rank rope causal window starts ends query_positions block_table "
        "block_table_stride page_size num_pages queries_end_at_ends latent_bits rope_bits"
    )
    _fields_ = (
        *[(name, ctypes.c_int64) for name in _names.split()],
        ("softmax_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_int64), ("strides", ctypes.c_int64 * 3))


class _Limits(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("max_shared_bytes", "shared_bytes_per_sm", "max_stages"))


class KernelStoppedError(RuntimeError):
    """A thread found a value that it must not work with."""


@dataclass(frozen=True, kw_only=True)
class Emulated:
    """The ops on one emulated machine, with the arguments of the public functions."""

    library: ctypes.CDLL
    max_shared_bytes: int = 163 * 1024
    max_stages: int = 4
    num_groups: int = 1
    seed: int = 0  # of the order in which warps and their threads run
    without_barrier: int = -1  # the barrier that every block passes over, counted from 0
    _limits: _Limits = field(init=False, repr=False, compare=False, default_factory=_Limits)

    def __post_init__(self) -> None:
        self._limits.max_shared_bytes = self.max_shared_bytes
        self._limits.shared_bytes_per_sm = self.max_shared_bytes
        self._limits.max_stages = self.max_stages

    def latent_attention(self, *tensors: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
        """q_latent, q_rope, c_kv, k_rope -> out, lse."""
        return self._forward(tensors, _shape(tensors, **rule), num_splits=1)

    def latent_attention_decode(self, *tensors: Tensor, num_splits: int = 1, **rule: Any) -> tuple[Tensor, Tensor]:
        """The same for the last queries of a cache, contiguous or paged."""
        rule["ends"] = rule.pop("lengths", None)
        return self._forward(tensors, _shape(tensors, decode=True, **rule), num_splits)

    def latent_attention_packed(self, *tensors: Tensor, num_splits: int = 1, **rule: Any) -> tuple[Tensor, Tensor]:
        """Over rows of codes."""
        return self._forward(tensors, _shape(tensors, **rule), num_splits)

    def latent_attention_backward(
        self, d_out: Tensor, d_lse: Tensor | None, tensors: list[Tensor], out: Tensor, lse: Tensor, **rule: Any
    ) -> list[Tensor]:
        """Gradients of q_latent, q_rope, c_kv and k_rope."""
        shape = _shape(tensors, **rule)
        gradients = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in tensors]
        delta = torch.full_like(lse, torch.nan)
        width = sum(-(-x.shape[-1] // 16) * 16 for x in tensors[2:])
        sums = torch.full((tensors[2].shape[0], self.num_groups, tensors[2].shape[1], width), torch.nan)
        self._call(
            "emulated_backward",
            shape,
            _view(d_out),
            _pointer(d_lse),
            *map(_view, tensors),
            _pointer(out),
            _pointer(lse),
            _pointer(delta),
            ctypes.c_int64(self.num_groups),
            _pointer(sums),
            *map(_pointer, gradients),
        )
        return gradients

    def rope_and_append(self, *tensors: Tensor, positions: Tensor, block_table: Tensor | None = None) -> None:
        """c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache: the caches are changed."""
        c_kv, k_rope, cos, _, cache, _ = tensors
        views = (_View * 6)(*map(_view, tensors))
        for angles in (2, 3):
            if tensors[angles].shape[0] == 1:
                views[angles].strides[0] = 0
        sizes = (ctypes.c_int64 * 4)(*c_kv.shape, k_rope.shape[2])
        stride, page_size, capacity = 0, 0, cache.shape[1]
        if block_table is not None:
            stride, page_size = block_table.stride(0), cache.shape[1]
            capacity = page_size * block_table.shape[1]
        pages = (ctypes.c_int64 * 4)(stride, page_size, capacity, cache.shape[0])
        self._call(
            "emulated_append",
            ctypes.c_int64(_DTYPES[c_kv.dtype]),
            ctypes.c_int64(cos.dtype == torch.float32),
            sizes,
            views,
            _pointer(positions),
            _pointer(block_table),
            pages,
        )

    def pack_rows(self, rows: Tensor, bits: Bits) -> Tensor:
        """[B, Q, n] -> uint8 [B, Q, bytes]."""
        width = rows.shape[2]
        out = torch.zeros(*rows.shape[:2], row_bytes(width, bits, 2), dtype=torch.uint8)
        self._call(
            "emulated_pack",
            ctypes.c_int64(_DTYPES[rows.dtype]),
            (ctypes.c_int64 * 3)(*rows.shape),
            ctypes.pointer(_view(rows)),
            ctypes.c_int64(layout_number(bits, width)),
            _pointer(out),
        )
        return out

    def stages_of_block(self, fixed: int, each: int) -> int:
        """Of a block that needs `fixed` bytes of shared memory, and `each` more for every stage."""
        sizes = (ctypes.c_int64(fixed), ctypes.c_int64(each))
        return int(self.library.stages_of_block(*sizes, ctypes.byref(self._limits)))

    def blocks_of_forward(self, *tensors: Tensor) -> tuple[int, int]:
        """Query rows of a block, and the blocks that a multiprocessor holds, for q_latent, q_rope, c_kv, k_rope."""
        shape = _shape(tensors, softmax_scale=1.0)
        return divmod(int(self.library.blocks_of_forward(ctypes.byref(shape), ctypes.byref(self._limits))), 100)

    def num_barriers(self, launch: int) -> int:
        """That a thread came to in one block of a kernel of the last call: its first launch is 0."""
        return int(self.library.emulated_barriers(launch))

    def _forward(self, tensors: Any, shape: _Shape, num_splits: int) -> tuple[Tensor, Tensor]:
        q_latent = tensors[0]
        batch, queries, heads, rank = q_latent.shape
        out = torch.full((batch, queries, heads, rank), torch.nan, dtype=q_latent.dtype)
        lse = torch.full((batch, heads, queries), torch.nan)
        sums = states = None
        if num_splits > 1:
            sums = torch.full((batch, queries * heads, num_splits, rank), torch.nan)
            states = torch.full((batch, queries * heads, num_splits, 2), torch.nan)
        self._call(
            "emulated_forward",
            shape,
            *map(_view, tensors),
            _pointer(out),
            _pointer(lse),
            ctypes.c_int64(num_splits),
            _pointer(sums),
            _pointer(states),
        )
        return out, lse

    def _call(self, function: str, *arguments: Any) -> None:
        self.library.emulated_schedule(self.seed, self.without_barrier)
        references = [ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in arguments]
        if getattr(self.library, function)(*references, ctypes.byref(self._limits)):
            raise KernelStoppedError(function)


def _shape(  # noqa: PLR0913  the rule of the ops
    tensors: Any,
    *,
    softmax_scale: float,
    causal: bool = True,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    block_table: Tensor | None = None,
    decode: bool = False,
    latent_bits: Bits = 16,
    rope_bits: Bits = 16,
) -> _Shape:
    q_latent, q_rope, c_kv, _ = tensors
    batch, queries, heads, rank = q_latent.shape
    shape = _Shape(q_latent.dtype == torch.float16, batch, queries, c_kv.shape[1], heads, rank, q_rope.shape[3])
    shape.causal, shape.window = causal, window or 0
    shape.softmax_scale, shape.softcap = softmax_scale, softcap or 0.0
    shape.starts, shape.ends = _address(starts), _address(ends)
    shape.query_positions, shape.queries_end_at_ends = _address(query_positions), decode
    bits = ((latent_bits, rank), (rope_bits, q_rope.shape[3]))
    shape.latent_bits, shape.rope_bits = (16 if each == 16 else layout_number(each, width) for each, width in bits)
    if block_table is not None:
        shape.block_table, shape.block_table_stride = _address(block_table), block_table.stride(0)
        shape.page_size, shape.num_pages = c_kv.shape[1], c_kv.shape[0]
        shape.num_tokens = block_table.shape[1] * c_kv.shape[1]
    return shape


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(tensor))


def _view(tensor: Tensor) -> _View:
    assert tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    strides = [*tensor.stride()[:-1], 0, 0][:3]
    return _View(tensor.data_ptr(), (ctypes.c_int64 * 3)(*strides))
