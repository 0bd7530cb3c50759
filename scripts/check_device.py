"""Compile all device code for every target and look at what came out; no GPU is needed.

Fails where a kernel does not compile, spills registers beyond the bounds below, or lacks the instructions that it is built
around: matrix products and, on NVIDIA, asynchronous copies and ldmatrix.

    python scripts/check_device.py                     all targets
    python scripts/check_device.py sm_90 gfx942        some
    python scripts/check_device.py --quick             for CI: QUICK says what of each target
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NVIDIA = ("sm_80", "sm_90", "sm_90a", "sm_100")
AMD = ("gfx90a", "gfx942")
# What --quick compiles: bfloat16 and float16 differ in two instructions, and the newer NVIDIA targets in the assembler alone.
QUICK = {
    "sm_80": "_float16",
    "sm_90a": "forward_bfloat16",
    "sm_100": "backward_bfloat16",
    "gfx90a": "_float16",
    "gfx942": "_bfloat16",
}
# CUDA: no stack, no spills. HIP: no scratch memory, no vector registers spilled; scalar registers that move to lanes of a
# vector register ("SGPRs Spill") cost an instruction each and no memory: the most observed was 163 (clang 19).
MAX_SPILLED_BYTES = 0
MAX_SPILLED_SCALARS = 192
# Kernels that are not built around matrix products.
ELEMENTWISE = ("combine_kernel", "delta_kernel", "sum_groups_kernel", "rope_and_append_kernel", "pack_rows_kernel")
NVIDIA_INSTRUCTIONS = {"HMMA": "mma.sync", "LDGSTS": "cp.async", "LDSM": "ldmatrix"}
AMD_SCRATCH = re.compile(r"\b(scratch|buffer)_(load|store)")  # global memory is read and written by global_ and flat_
AMD_INSTRUCTIONS = {  # of bfloat16 and of float16; CDNA 3 has the same ones under new names
    "gfx90a": ("v_mfma_f32_16x16x16bf16_1k", "v_mfma_f32_16x16x16f16"),
    "gfx942": ("v_mfma_f32_16x16x16_bf16", "v_mfma_f32_16x16x16_f16"),
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the compiler says of one kernel."""

    name: str
    registers: int
    spilled_bytes: int
    spilled_scalars: int = 0
    missing: tuple[str, ...] = ()

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, or None."""
        if self.spilled_bytes > MAX_SPILLED_BYTES:
            return f"{self.spilled_bytes} bytes of stack, spills and scratch memory (bound {MAX_SPILLED_BYTES})"
        if self.spilled_scalars > MAX_SPILLED_SCALARS:
            return f"{self.spilled_scalars} scalar registers spilled (bound {MAX_SPILLED_SCALARS})"
        if self.missing:
            return f"no {' and no '.join(self.missing)} in its machine code"
        return None


def main() -> int:
    """Exit code 1 where something is wrong, 2 where a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="sm_80, gfx942, ... (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--quick", action="store_true", help="a part for each target, for CI")
    parser.add_argument("--without", action="append", choices=["nvidia", "amd"], default=[], help="leave a vendor out")
    arguments = parser.parse_args()
    targets = arguments.targets or _all_targets(arguments.quick, arguments.without)
    for target in targets:
        if target not in NVIDIA + AMD:
            parser.error(f"{target}: expected one of {', '.join(NVIDIA + AMD)}")
    sources = sorted((ROOT / "csrc").glob("*/gpu/instantiate/*.cu"))
    launchers = sorted((ROOT / "csrc").glob("*/gpu/launch.cu"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {
            pool.submit(_check_kernels, source, target, Path(folder)): (source, target)
            for target in targets
            for source in sources
            if not (arguments.quick and _left_out_of_quick(source, target))
        }
        if any(target in NVIDIA for target in targets):
            jobs |= {pool.submit(_check_launcher, file, Path(folder)): (file, "host") for file in launchers}
        failures = sum(_report(job, *jobs[job]) for job in concurrent.futures.as_completed(jobs))
    print(f"check-device: {len(jobs)} objects for {', '.join(targets) or 'no target'}: {failures or 'no'} failures")
    return 1 if failures else 0


def _all_targets(quick: bool, without: list[str]) -> list[str]:
    of_nvidia = tuple(target for target in NVIDIA if target in QUICK or not quick)
    return [
        *([] if "nvidia" in without else _known_to_nvcc(of_nvidia)),
        *([] if "amd" in without else AMD),
    ]


def _left_out_of_quick(source: Path, target: str) -> bool:
    if source.name == "every_dtype.cu":
        return target not in (NVIDIA[0], AMD[0])
    return QUICK.get(target, "_bfloat16") not in source.stem


def _report(job: concurrent.futures.Future[list[Kernel]], source: Path, target: str) -> int:
    where = f"{source.relative_to(ROOT / 'csrc')} for {target}"
    try:
        kernels = job.result()
    except subprocess.CalledProcessError as error:
        print(f"{where}: does not compile\n{error.stderr}")
        return 1
    complaints = [f"{where}: {kernel.name}: {kernel.complaint}" for kernel in kernels if kernel.complaint]
    most = max((kernel.registers for kernel in kernels), default=0)
    fine = f"{len(kernels)} kernels, at most {most} registers, nothing spilled" if kernels else "compiles"
    print("\n".join(complaints) or f"{where}: {fine}")
    return len(complaints)


def _check_kernels(source: Path, target: str, folder: Path) -> list[Kernel]:
    binary = _binary(source, target, folder)
    return _check_amd(source, target, binary) if target in AMD else _check_nvidia(source, target, binary)


def _binary(source: Path, target: str, folder: Path) -> Path:
    return folder / f"{'_'.join(source.relative_to(ROOT / 'csrc').with_suffix('').parts)}_{target}.o"


def _check_nvidia(source: Path, target: str, binary: Path) -> list[Kernel]:
    arch = f"-gencode=arch={target.replace('sm_', 'compute_')},code={target}"
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", arch, *_includes()]
    log = _run([_nvcc(), *flags, "-c", str(source), "-o", str(binary)]).stderr
    kernels = {}
    for block in log.split("Compiling entry function ")[1:]:
        name = re.search(r"'(\w+)'", block)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        assert name and stack and registers, f"unexpected words of ptxas: {block}"
        kernels[name[1]] = Kernel(
            name=name[1], registers=int(registers[1]), spilled_bytes=sum(int(part) for part in stack.groups())
        )
    assert kernels, f"{source}: ptxas reports no kernel"
    code = dict(_sass_functions(binary))
    return [_with_missing(kernel, code[name], NVIDIA_INSTRUCTIONS) for name, kernel in kernels.items()]


def _sass_functions(binary: Path) -> Iterator[tuple[str, str]]:
    text = _run([_tool("cuobjdump"), "--dump-sass", str(binary)]).stdout
    for block in text.split("Function : ")[1:]:
        name, _, code = block.partition("\n")
        yield name.strip(), code


def _check_amd(source: Path, target: str, binary: Path) -> list[Kernel]:
    flags = f"-x hip --offload-arch={target} --cuda-device-only --no-gpu-bundle-output -nogpulib -nogpuinc".split()
    flags += ["-std=c++17", "-O3", "-Rpass-analysis=kernel-resource-usage", *_includes()]
    log = _run(["clang++-19", *flags, "-c", str(source), "-o", str(binary)]).stderr
    code = dict(_amd_functions(binary))
    kernels = []
    for block in log.split("Function Name: ")[1:]:
        name = block.split()[0]
        number = {
            key: int(value) for key, value in re.findall(r"remark: \S* *([A-Za-z ]+?)(?: \[[^\]]*\])?: (\d+)", block)
        }
        vectors, scalars = number["VGPRs Spill"], number["SGPRs Spill"]
        # clang leaves room for scalars that live in lanes of vector registers: memory counts where an instruction touches it
        scratch = number["ScratchSize"] if AMD_SCRATCH.search(code[name]) else 0
        kernel = Kernel(
            name=name,
            registers=number["VGPRs"],
            spilled_bytes=scratch + 4 * vectors,
            spilled_scalars=scalars,
        )
        instruction = AMD_INSTRUCTIONS[target]["BFloat16" not in name]
        kernels.append(_with_missing(kernel, code[name], {instruction: instruction}))
    assert kernels, f"{source}: clang reports no kernel"
    return kernels


def _amd_functions(binary: Path) -> Iterator[tuple[str, str]]:
    text = _run([_llvm("llvm-objdump"), "-d", str(binary)]).stdout
    for block in re.split(r"\n[0-9a-f]+ <", text)[1:]:
        name, _, code = block.partition(">:")
        yield name, code


def _with_missing(kernel: Kernel, code: str, instructions: Mapping[str, str]) -> Kernel:
    if any(name in kernel.name for name in ELEMENTWISE):
        return kernel
    missing = tuple(words for instruction, words in instructions.items() if instruction not in code)
    return Kernel(**{**vars(kernel), "missing": missing})


def _check_launcher(source: Path, folder: Path) -> list[Kernel]:
    """launch.cu against torch's headers, which the CPU build of torch has as well."""
    from torch.utils.cpp_extension import include_paths

    macros = ["-DXECO_DEVICE_LIBRARY", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags = ["-std=c++17", "-O1", "-gencode=arch=compute_80,code=sm_80", *macros, *_includes()]
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    _run([_nvcc(), *flags, *includes, "-c", str(source), "-o", str(_binary(source, "host", folder))])
    return []


def _includes() -> list[str]:
    return [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]


def _known_to_nvcc(targets: tuple[str, ...]) -> list[str]:
    known = _run([_nvcc(), "--list-gpu-arch"]).stdout.split()
    supported = [target for target in targets if target.rstrip("a").replace("sm_", "compute_") in known]
    for target in sorted(set(targets) - set(supported)):
        print(f"check-device: {target} is unknown to this nvcc: left out")
    return supported


def _nvcc() -> str:
    return _tool("nvcc")


def _tool(name: str) -> str:
    """From PATH, CUDA_HOME, or NVIDIA's packages from PyPI."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [shutil.which(name), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name]
    places += sorted(packages.glob(f"**/bin/{name}"))
    for place in places:
        if place and Path(place).is_file():
            return str(place)
    sys.exit(f"check-device: {name} is missing: scripts/check_device.sh installs it")


def _llvm(name: str) -> str:
    for place in (shutil.which(f"{name}-19"), "/usr/lib/llvm-19/bin/" + name):
        if place and Path(place).is_file():
            return str(place)
    sys.exit(f"check-device: {name} (LLVM 19) is missing: apt-get install llvm-19")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    sys.exit(main())
