"""check_release.py FOLDER: refuses files that must not be published. Standard library alone.

A wheel holds the CPU's kernels and no more: no GPU module, no local version such as +cu130 that would promise one. An sdist
holds what the GPU kernels are built from.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

# what setup.py compiles into xeco_convert._device, and a file of each op that has a kernel there
DEVICE_SOURCES = (
    "csrc/device/module.cc",
    "csrc/device/stream.h",
    "csrc/include/xeco/gpu_compat.h",
    "csrc/latent_attention/gpu/launch.cu",
    "csrc/pack_rows/gpu/launch.cu",
    "csrc/rope_and_append/gpu/launch.cu",
)


def obstacle(file: Path) -> str | None:
    """Why a wheel or sdist cannot be published, or None."""
    if file.suffix == ".whl":
        return _wheel_obstacle(file)
    with tarfile.open(file) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = [source for source in DEVICE_SOURCES if source not in held]
    return f"expected the sources of the GPU kernels, found no {', '.join(missing)}" if missing else None


def _wheel_obstacle(file: Path) -> str | None:
    version = file.name.split("-")[1]
    if "+" in version:
        return f"expected a plain version, found {version}, which promises GPU kernels that no wheel has"
    names = zipfile.ZipFile(file).namelist()
    if any(re.fullmatch(r"xeco_convert/_device\..*", name) for name in names):
        return "expected the CPU's kernels alone, found xeco_convert._device; build with XECO_BUILD_DEVICE=0"
    if not any(re.fullmatch(r"xeco_convert/_C\..*\.so", name) for name in names):
        return "expected the CPU's kernels, found no xeco_convert._C; build with XECO_BUILD_EXT=1"
    return None


def main(folder: Path) -> None:
    """Exits with a sentence for each file that is refused."""
    files = sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
    refused = [f"{file}: {reason}" for file in files if (reason := obstacle(file))]
    if refused or not files:
        sys.exit("\n".join(refused) or f"{folder}: expected wheels or an sdist, found none")
    print("\n".join(f"{file.name}: may be published" for file in files))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
