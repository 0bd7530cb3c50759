"""Headers of csrc/: those that need no other before them compile by themselves, those that do are called -inl.h."""

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "device"))

from emulated import ROOT, compiler_of_host, emulation_flags

HEADERS = sorted(file for suffix in ("h", "cuh") for file in (ROOT / "csrc").glob(f"**/*.{suffix}"))
STANDALONE = [file for file in HEADERS if not file.stem.endswith("-inl")]
# These need the vendor's compiler or its headers: `make check-device` compiles them.
OF_A_VENDOR = ("include/xeco/gpu/nvidia.h", "include/xeco/gpu/amd.h", "device/stream.h")


def name(file: Path) -> str:
    return file.relative_to(ROOT / "csrc").as_posix()


def needs_torch(file: Path) -> bool:
    return any(header in file.read_text("utf-8") for header in ("<torch/", "<pybind11/", "_checks.h", "/checks.h"))


@pytest.mark.parametrize("file", [file for file in STANDALONE if name(file) not in OF_A_VENDOR], ids=name)
def test_a_header_compiles_by_itself(file: Path, tmp_path: Path) -> None:
    compiler = compiler_of_host()
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += emulation_flags("mma")
    if needs_torch(file):
        from torch.utils.cpp_extension import include_paths

        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{name(file)}"\n', "utf-8")
    done = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(flags)}\n{done.stderr}"


@pytest.mark.parametrize("module", ["module.cpp", "device/module.cc"])
def test_modules_compile_where_pybind11_refuses_files_of_the_stable_abi(module: str, tmp_path: Path) -> None:
    """As torch 2.11 has it in its own copy of pybind11, before any other that is installed."""
    from torch.utils.cpp_extension import include_paths

    compiler = compiler_of_host()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "pybind11").mkdir()
    for header in ("pybind11.h", "stl.h"):
        guard = "#ifdef TORCH_TARGET_VERSION\n#error no stable ABI\n#endif\n"
        (tmp_path / "pybind11" / header).write_text(f"{guard}#include_next <pybind11/{header}>\n", "utf-8")
    facts = ("XECO_VERSION", "XECO_BUILT_WITH_TORCH", "XECO_DEVICE_BACKEND", "XECO_DEVICE_ARCHS")
    flags = ["-x", "c++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f'-D{fact}="x"' for fact in facts)]
    flags += [f"-I{folder}" for folder in (tmp_path, ROOT / "csrc", ROOT / "csrc" / "include")]
    flags += [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    command = [*compiler, *flags, str(ROOT / "csrc" / module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", HEADERS, ids=name)
def test_a_header_has_a_guard_unless_what_it_means_depends_on_what_is_before_it(file: Path) -> None:
    assert ("#pragma once" in file.read_text("utf-8")) == (file in STANDALONE)


@pytest.mark.parametrize("folder", ["cpu", "include", "device"])
def test_what_all_ops_share_includes_nothing_of_one(folder: str) -> None:
    ops = [file.parent.name for file in (ROOT / "csrc").glob("*/params.h")]
    assert len(ops) == 3
    for file in (ROOT / "csrc" / folder).glob("**/*.*"):
        text = file.read_text("utf-8")
        assert not any(f'#include "{op}/' in text for op in ops), name(file)
