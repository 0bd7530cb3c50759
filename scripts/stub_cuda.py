"""stub_cuda.py FOLDER: shared libraries that let a CUDA build of torch be imported without CUDA, to test CPU code under it.

PyPI has only CUDA builds of most torch versions for x86_64; CUDA's own libraries are gigabytes more. torch's libraries ask
for them by name when loaded, although nothing of them runs on the CPU. Here each gets an empty stand-in: every symbol that
torch wants of it, in the version that torch wants, as a function that returns 0. With FOLDER in LD_LIBRARY_PATH, `import
torch` works, torch.cuda.is_available() is False, and CPU tensors compute as ever. Needs gcc, objdump and readelf.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

_OF_THE_SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp)\.so|ld-linux")
# symbols without a version do not say whose they are
_OF_CUDA = re.compile(r"(cu[a-z]*[A-Z]|__cuda|p?nccl|nvshmem|cublas|cusp|cuf|curand|cusolver)")


def main(folder: Path) -> None:
    """Write one library for each that torch's libraries miss."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("stub_cuda.py: torch is not installed in this Python")
    libraries = sorted((Path(spec.submodule_search_locations[0]) / "lib").glob("*.so*"))
    present = {library.name for library in libraries}
    wanted: dict[str, dict[str, str | None]] = {}
    unversioned: set[str] = set()
    for library in libraries:
        for name in re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library)):
            if name not in present and not _OF_THE_SYSTEM.match(name):
                wanted.setdefault(name, {})
    for library in libraries:
        owners = version_owners(library)
        for symbol, version in undefined_symbols(library):
            owner = owners.get(version or "")
            if owner in wanted:
                wanted[owner][symbol] = version
            elif version is None and _OF_CUDA.match(symbol):
                unversioned.add(symbol)
    if not wanted:
        sys.exit("stub_cuda.py: this torch needs no CUDA")
    folder.mkdir(parents=True, exist_ok=True)
    # any library will do for those without a version
    first = next(iter(wanted.values()))
    for symbol in unversioned:
        first.setdefault(symbol, None)
    for name, symbols in wanted.items():
        write_stub(folder / name, symbols)
    print(f"{len(wanted)} stand-ins in {folder}: {', '.join(sorted(wanted))}")


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def version_owners(library: Path) -> dict[str, str]:
    """Name of a version → the library that torch expects it from."""
    owners: dict[str, str] = {}
    current = ""
    for line in output("objdump", "-p", library).splitlines():
        if match := re.match(r"\s+required from (\S+):", line):
            current = match[1]
        elif current and (match := re.match(r"\s+0x\w+ 0x\w+ \d+ (\S+)", line)):
            owners[match[1]] = current
    return owners


def undefined_symbols(library: Path) -> list[tuple[str, str | None]]:
    """Symbols that a library takes from others, with their versions."""
    found = []
    for line in output("objdump", "-T", library).splitlines():
        fields = line.split()
        if "*UND*" in fields:
            version = fields[-2].strip("()") if fields[-2].startswith("(") else None
            found.append((fields[-1], version))
    return found


def write_stub(path: Path, symbols: dict[str, str | None]) -> None:
    """Compile one stand-in."""
    source, versions = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("".join(f"long {symbol}() {{ return 0; }}\n" for symbol in symbols) or "int unused;\n")
    by_version = defaultdict(list)
    for symbol, version in symbols.items():
        if version is not None:
            by_version[version].append(symbol)
    versions.write_text(
        "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in by_version.items())
    )
    command = [
        "gcc",
        "-w",
        "-fno-builtin",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{path.name}",
        "-o",
        str(path),
        str(source),
    ]
    if by_version:
        command.append(f"-Wl,--version-script={versions}")
    subprocess.run(command, check=True)


if len(sys.argv) != 2:
    sys.exit(__doc__)
main(Path(sys.argv[1]))
