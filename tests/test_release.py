"""What may be published: wheels with the CPU's kernels alone, an sdist with the sources of the GPU's."""

from __future__ import annotations

import runpy
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHECK: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "check_release.py"))
MODULE = "xeco_convert/_C.cpython-311-x86_64-linux-gnu.so"


def wheel(folder: Path, version: str = "1.0", *names: str) -> Path:
    file = folder / f"xeco_convert-{version}-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("xeco_convert/__init__.py", *names):
            archive.writestr(name, "")
    return file


def sdist(folder: Path, *left_out: str) -> Path:
    file = folder / "xeco_convert-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for source in ROOT.glob("csrc/**/*.*"):
            name = source.relative_to(ROOT).as_posix()
            if name not in left_out:
                archive.add(source, f"xeco_convert-1.0/{name}")
    return file


def test_a_wheel_of_the_cpu_and_an_sdist_may_be_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(tmp_path, "1.0", MODULE)
    sdist(tmp_path)
    CHECK["main"](tmp_path)
    assert capsys.readouterr().out.count("may be published") == 2


@pytest.mark.parametrize(
    ("version", "names", "reason"),
    [
        ("1.0", (MODULE, "xeco_convert/_device.cpython-311-x86_64-linux-gnu.so"), "found xeco_convert._device"),
        ("1.0+cu130", (MODULE,), "found 1.0\\+cu130, which promises GPU kernels"),
        ("1.0+rocm7.0", (MODULE,), "found 1.0\\+rocm7.0"),
        ("1.0", (), "found no xeco_convert._C"),
    ],
)
def test_a_wheel_that_holds_or_promises_gpu_kernels_is_refused(
    version: str, names: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    wheel(tmp_path, version, *names)
    with pytest.raises(SystemExit, match=reason):
        CHECK["main"](tmp_path)


@pytest.mark.parametrize("left_out", CHECK["DEVICE_SOURCES"])
def test_an_sdist_without_device_sources_is_refused(left_out: str, tmp_path: Path) -> None:
    sdist(tmp_path, left_out)
    with pytest.raises(SystemExit, match=f"found no {left_out}"):
        CHECK["main"](tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected wheels or an sdist, found none"):
        CHECK["main"](tmp_path)


def test_the_workflow_builds_without_gpu_kernels_and_checks_before_it_publishes() -> None:
    """cibuildwheel's settings leave them out, no job overrides that, and every upload comes behind the check."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        environment = tomllib.load(file)["tool"]["cibuildwheel"]["linux"]["environment"]
    assert environment["XECO_BUILD_DEVICE"] == "0" and environment["XECO_BUILD_EXT"] == "1"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))
    uploads = 0
    for job in workflow["jobs"].values():
        commands = [step.get("run", "") for step in job["steps"]]
        assert not any("CIBW_ENVIRONMENT" in step.get("env", {}) for step in job["steps"])
        for number, step in enumerate(job["steps"]):
            if "upload-artifact" in step.get("uses", ""):
                uploads += 1
                assert any("check_release.py" in command for command in commands[:number])
    assert uploads == 2 and "device-wheels" not in workflow["jobs"]


def test_every_package_is_in_the_wheel() -> None:
    """A folder that the list of packages leaves out works in a checkout, and is missing where the wheel is installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {"xeco_convert": ROOT / "xeco_convert", "xeco_distill": ROOT / "distill"}
    found = {
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for file in folder.rglob("*.py")
    }
    assert set(listed) == found | {"xeco_convert.demo.model"}  # whose files are data
