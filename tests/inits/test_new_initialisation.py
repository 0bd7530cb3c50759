"""An initialisation is one class: this file adds one, with an option of its own, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import xeco_convert
from xeco_convert.checkpoint import TensorReader
from xeco_convert.cli import main
from xeco_convert.errors import OptionError
from xeco_convert.factorize import MlaAttention
from xeco_convert.factorize.layer_weights import LayerErrors
from xeco_convert.initialisation import INITIALISATIONS, ConvertedLayer, Initialisation, LayerMaker, Progress
from xeco_convert.modeling.layer_xeco import FIELDS
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import ConversionPlan
from xeco_convert.ranks import Widths
from xeco_convert.settings import option
from xeco_convert.source import SourceModel
from xeco_convert.source_attention import read_attention
from xeco_convert.stopwatch import Timings


@dataclass(frozen=True, kw_only=True)
class NoiseInitialisation(Initialisation):
    """Random factors beside the source's output projection: a lower bound for all others."""

    name = "noise"
    about = "random factors"
    advice = "Random factors: train before use."

    noise: float = option("noise: standard deviation of the factors.", 0.02, metavar="S")

    def check_source(self, source: SourceModel) -> None:
        if source.family.has_key_norm:
            raise OptionError(f"--init noise: not for {source.family.model_type}.")

    def head_widths(self, source: SourceModel, options: ConvertOptions, rotary_dim: int) -> tuple[int, int]:
        return source.geometry.head_dim, options.rope_dim or rotary_dim

    def begin(
        self, plan: ConversionPlan, device: torch.device, on_progress: Progress, measured_by: LayerMaker | None = None
    ) -> LayerMaker:
        return NoiseLayers(self.noise, plan.source, device)


class NoiseLayers:
    def __init__(self, noise: float, source: SourceModel, device: torch.device) -> None:
        self._noise, self._source, self._device = noise, source, device
        self._reader = TensorReader(source.index)

    def spectra(self) -> list[NDArray[np.float64]]:
        return [np.ones(16) for _ in self._source.kinds]

    def costs(self, offers: Sequence[Widths], average: float) -> list[dict[Widths, float]]:
        raise NotImplementedError

    def layers(self, plan: ConversionPlan) -> Iterator[ConvertedLayer]:
        generator = torch.Generator().manual_seed(plan.options.seed)
        for item in plan.converted:
            source = read_attention(self._source, self._reader, item.layer, self._device)
            sizes = item.shape.tensors().items()
            tensors = {FIELDS[name]: self._noise * torch.randn(size, generator=generator) for name, size in sizes}
            factors = MlaAttention(**tensors | {"o_weight": source.o_weight})
            yield ConvertedLayer(
                layer=item.layer, source=source, factors=factors, errors=LayerErrors(key=1.0, value=1.0)
            )

    def summary(self) -> dict[str, Any]:
        return {"noise": self._noise}

    def timings(self) -> Timings:
        return {}


@pytest.fixture(autouse=True)
def noise() -> Iterator[None]:
    INITIALISATIONS.add(NoiseInitialisation)
    yield
    INITIALISATIONS.remove("noise")


@pytest.mark.parametrize("ranks", [{"rank": 8}, {"energy": 0.5}])
def test_it_converts_with_every_policy_that_it_serves(ranks: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    report = xeco_convert.convert(llama, tmp_path / "out", init="noise", noise=0.5, **ranks)
    assert report.summary["noise"] == 0.5
    assert [layer.kv_lora_rank for layer in report.layers] == [8] * 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert 0.4 < float(model.model.layers[0].self_attn.kv_b_proj.weight.std()) < 0.6
    assert "Random factors: train before use." in (tmp_path / "out" / "README.md").read_text()


def test_the_command_line_has_it_and_its_option(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "or noise (random factors)" in text and "--noise S" in text and "--init [calibrated|paper|noise]" in text
    with pytest.raises(SystemExit) as end:
        main([str(llama), str(tmp_path / "out"), "--init", "noise", "--noise", "0.1", "--rank", "8", "--quiet"])
    assert end.value.code in (0, None) and (tmp_path / "out" / "model.safetensors").is_file()


def test_options_of_others_are_refused_by_all() -> None:
    with pytest.raises(OptionError, match=r"--noise: only with --init noise; leave one of them out"):
        xeco_convert.ConvertOptions(rank=8, noise=0.1)
    with pytest.raises(OptionError, match=r"--calibration: only with --init calibrated; leave one of them out"):
        xeco_convert.ConvertOptions(rank=8, init="noise", calibration="text.txt")
    with pytest.raises(OptionError, match=r"--kv-size: only with --init calibrated; leave one of them out"):
        xeco_convert.ConvertOptions(kv_size="50%", init="noise")
