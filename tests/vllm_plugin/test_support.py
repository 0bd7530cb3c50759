"""What of vLLM support shows without vLLM: the entry point, a class or a reason for every family, refusals in one sentence."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import xeco_convert.vllm
from xeco_convert.errors import UnsupportedModelError
from xeco_convert.families import WRAPPERS, supported_model_types
from xeco_convert.modeling import MlaLayer
from xeco_convert.vllm.support import (
    FAMILIES,
    KNOWN_VERSIONS,
    ServingSettings,
    architectures,
    check_layer,
    check_version,
)

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
LAYER = MlaLayer(kv_lora_rank=48, qk_nope_head_dim=64, qk_rope_head_dim=24, v_head_dim=64)
CPU = ServingSettings(device="cpu", max_model_len=4096)
GPU = ServingSettings(device="gpu", max_model_len=4096)


def test_vllm_finds_the_plugin_by_the_metadata_of_this_package() -> None:
    settings = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    points = settings["project"]["entry-points"]["vllm.general_plugins"]
    loaded = [EntryPoint(name, value, "vllm.general_plugins").load() for name, value in points.items()]
    assert loaded == [xeco_convert.vllm.register]
    assert "xeco_convert.vllm" in settings["tool"]["setuptools"]["packages"]


def test_neither_the_package_nor_its_plugin_imports_vllm() -> None:
    program = "import sys, xeco_convert, xeco_convert.vllm, xeco_convert.vllm.support; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_no_folder_of_tests_passes_for_a_package_that_is_looked_for() -> None:
    """Folders on the path are packages to `find_spec`, by which others see whether vLLM is there."""
    folders = {path.name for path in Path(__file__).resolve().parents[1].iterdir() if path.is_dir()}
    assert not folders & {
        "vllm",
        "mlx",
        "mlx_lm",
        "gguf",
        "trl",
        "peft",
        "lm_eval",
        "datasets",
        "accelerate",
        "optimum",
    }


def test_every_family_is_served_or_refused_with_a_reason() -> None:
    assert set(FAMILIES) == set(supported_model_types())
    for family in FAMILIES.values():
        assert bool(family.refusal) != bool(family.module and family.class_name)
    names = architectures()
    assert {f"Xeco{spec.class_prefix}ForCausalLM" for spec in supported_model_types().values()} <= set(names)
    assert len(names) == len(FAMILIES) + len(set(WRAPPERS.values()))


@pytest.mark.parametrize("version", [f"{KNOWN_VERSIONS[0]}.0", f"{KNOWN_VERSIONS[0]}.7rc1"])
def test_known_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.9.2", "1.0.0", "dev"])
def test_other_versions_are_refused_with_those_that_work(version: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"vLLM {version}: expected {KNOWN_VERSIONS[0]}, .*XECO_VLLM_ANY_VERSION"
    ):
        check_version(version)


def test_the_cpu_takes_any_width_window_and_cap() -> None:
    wide = replace(LAYER, kv_lora_rank=700, qk_rope_head_dim=2, logit_softcap=30.0)
    check_layer(0, wide, 8, CPU)


@pytest.mark.parametrize(
    ("layer", "window", "settings", "sentence"),
    [
        (LAYER, None, replace(CPU, cache_dtype="fp8"), "found --kv-cache-dtype fp8; leave it out"),
        (replace(LAYER, logit_softcap=30.0), None, GPU, "soft-capped"),
        (LAYER, 512, GPU, "start with --max-model-len 512"),
        (replace(LAYER, kv_lora_rank=8), None, GPU, "found 8 and 24; convert with --rank"),
        (replace(LAYER, qk_rope_head_dim=8), None, GPU, "found 48 and 8; convert with --rank"),
        (replace(LAYER, kv_lora_rank=536, qk_rope_head_dim=40), None, GPU, "a latent of 257 to 512, found 536"),
        (replace(LAYER, kv_lora_rank=128, qk_rope_head_dim=160), None, GPU, "a latent of 129 to 256, found 128"),
        (replace(LAYER, qk_nope_head_dim=250), None, GPU, "at most 256 numbers, found 274"),
        (replace(LAYER, biases=("kv_b",), logit_softcap=3.0), None, CPU, "keys have a bias"),
    ],
)
def test_what_the_attention_of_a_device_cannot_do_is_refused(
    layer: MlaLayer, window: int | None, settings: ServingSettings, sentence: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^layer 3: .*{sentence}"):
        check_layer(3, layer, window, settings)


def test_gpus_take_windows_that_are_no_shorter_than_the_text_and_layers_without_rotation() -> None:
    check_layer(0, LAYER, 4096, GPU)
    check_layer(0, replace(LAYER, qk_rope_head_dim=0), None, GPU)
