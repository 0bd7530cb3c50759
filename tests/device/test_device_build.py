"""What setup.py decides about the GPU kernels, and that the CPU's stand where they cannot be built."""

import runpy
import types
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, in an environment that asks for nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("XECO_BUILD_EXT", "0")
    for name in ("XECO_BUILD_DEVICE", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(SETUP))


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch of CUDA 13.0, and an nvcc of CUDA 13.2."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.2, V13.2.1\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return nvcc


def without_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("toolkit")
def test_they_are_built_where_torch_has_cuda(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert build["device_wanted"]() is True
    monkeypatch.setenv("XECO_BUILD_DEVICE", "1")
    assert build["device_wanted"]() is True
    monkeypatch.setenv("XECO_BUILD_DEVICE", "0")
    assert build["device_wanted"]() is False


def test_a_torch_without_gpu_backend_is_no_reason_for_a_word(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu_backend(monkeypatch)
    assert build["device_wanted"]() is False and capsys.readouterr().out == ""
    monkeypatch.setenv("XECO_BUILD_DEVICE", "1")
    with pytest.raises(SystemExit, match="asks for the GPU kernels, but this torch has neither CUDA nor ROCm"):
        build["device_wanted"]()


@pytest.mark.usefixtures("toolkit")
def test_what_is_missing_is_said(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert build["device_wanted"]() is False
    said = "built without the GPU kernels, since CUDA_HOME names no CUDA toolkit"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("words", "complaint"), [("release 12.4, V12.4.1", "is of CUDA 12.4"), ("", "does not run")])
def test_an_nvcc_that_does_not_fit_torch_is_refused(
    build: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch, words: str, complaint: str
) -> None:
    toolkit.write_text(f"#!/bin/sh\necho {words}\n" if words else "#!/bin/sh\nexit 1\n", encoding="utf-8")
    monkeypatch.setenv("XECO_BUILD_DEVICE", "1")
    with pytest.raises(SystemExit, match=rf"torch is of CUDA 13\.0, and nvcc of CUDA_HOME .* {complaint}"):
        build["device_wanted"]()


@pytest.mark.parametrize("choice", ["yes", "2"])
def test_other_words_are_refused(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("XECO_BUILD_DEVICE", choice)
    with pytest.raises(SystemExit, match=f"XECO_BUILD_DEVICE: expected 0 or 1, found '{choice}'"):
        build["device_wanted"]()


def command(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, built: list[str], fails: str) -> Any:
    """build_ext with both modules, whose compiler is a list of what was built."""

    def build_extensions(self: Any) -> None:
        assert not hasattr(self.compiler, "changed")  # by the step before
        self.compiler.changed = True
        for module in self.extensions:
            if module.name == fails:
                raise RuntimeError("Error compiling objects for extension")
            built.append(module.name)

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", build_extensions)
    build_class = build["build_in_two_steps"]()
    step = build_class.__new__(build_class)
    step.compiler = types.SimpleNamespace()
    names = ("xeco_convert._device", "xeco_convert._C")
    step.extensions = [setuptools.Extension(name, []) for name in names]
    return step


def test_both_modules_are_built_the_cpus_first(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    step = command(build, monkeypatch, built, fails="")
    step.build_extensions()
    assert built == ["xeco_convert._C", "xeco_convert._device"] == [module.name for module in step.extensions]


def test_a_failure_of_the_gpu_kernels_leaves_the_cpus(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []
    step = command(build, monkeypatch, built, fails="xeco_convert._device")
    step.build_extensions()
    assert built == ["xeco_convert._C"] == [module.name for module in step.extensions]
    assert "built without the GPU kernels, since that failed: Error compiling" in capsys.readouterr().out


@pytest.mark.parametrize("fails", ["xeco_convert._device", "xeco_convert._C"])
def test_a_failure_of_what_was_asked_for_is_one(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    if fails == "xeco_convert._device":
        monkeypatch.setenv("XECO_BUILD_DEVICE", "1")
    step = command(build, monkeypatch, [], fails)
    with pytest.raises(RuntimeError, match="Error compiling"):
        step.build_extensions()
