"""When the GPU kernels are imported, and what is said where they do not serve."""

import importlib
import types

import pytest
import torch

import xeco_convert
from xeco_convert.ops import extension
from xeco_convert.ops.extension import DEVICE_NAME, ExtensionError
from xeco_convert.ops.fused import unasked_obstacle


@pytest.fixture
def torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name))


def offer(monkeypatch: pytest.MonkeyPatch, version: str) -> types.ModuleType:
    module = types.ModuleType(DEVICE_NAME)
    module.version, module.__file__ = version, "_device.so"
    monkeypatch.setattr(importlib, "import_module", {DEVICE_NAME: module}.__getitem__)
    return module


@pytest.mark.usefixtures("torch_with_cuda")
def test_the_library_is_imported_where_torch_has_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    module = offer(monkeypatch, xeco_convert.__version__)
    assert extension._import_device() is module


def test_it_is_not_imported_where_torch_has_no_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, xeco_convert.__version__)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert extension._import_device() is None


@pytest.mark.usefixtures("torch_with_cuda")
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "0.0.0")
    with pytest.raises(ExtensionError, match=r"was built from 0\.0\.0"):
        extension._import_device()


@pytest.mark.usefixtures("torch_with_cuda")
def test_a_library_that_does_not_load_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"{name}: libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.warns(UserWarning, match="does not load with torch"):
        assert extension._import_device() is None


def test_the_obstacle_of_a_gpu_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_DEVICE", None)
    assert "_device are not there" in extension.kernel_obstacle("cuda", torch.bfloat16)
    monkeypatch.setattr(extension, "_DEVICE", types.ModuleType(DEVICE_NAME))
    assert extension.kernel_obstacle("cuda", torch.bfloat16) is None
    assert unasked_obstacle("cuda", torch.bfloat16) is None
    assert "bfloat16 and float16, not float32" in extension.kernel_obstacle("cuda", torch.float32)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "XECO_ATTENTION=fused takes them" in str(unasked_obstacle("cuda", torch.bfloat16))


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("present", [True, False])
def test_only_what_no_kernel_takes_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, present: bool
) -> None:
    monkeypatch.setattr(extension, "_DEVICE", types.ModuleType(DEVICE_NAME) if present else None)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensor = types.SimpleNamespace(dtype=dtype, is_cuda=on_gpu)
        expected = dtype == torch.float64 or (dtype == torch.float32 and on_gpu and present)
        assert extension.runs_in_reference(tensor) is expected
