"""config.json of every model that the README names, as published, through a whole conversion; only sizes are shrunk."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomise, stored_tensors, write_json, write_tokenizer, write_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.families import supported_model_types
from xeco_convert.options import ConvertOptions
from xeco_convert.plan import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]
FILES = sorted((Path(__file__).resolve().parents[1] / "published_configs").glob("*.json"))
PUBLISHED: dict[str, dict[str, Any]] = {
    name: config for file in FILES for name, config in json.loads(file.read_text(encoding="utf-8")).items()
}
VOCABULARY = 96
HEAD_DIM = 16
LAYERS = {"gemma3_text": 6, "smollm3": 4}  # one period of the pattern of layers; two layers elsewhere
# Fields in which published models differ that no weight and no product of attention depends on.
OUTSIDE_ATTENTION = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "router_aux_loss_coef"),
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "output_router_logits", "pretraining_tp"),
)


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with small matrices: sizes, token ids and lists with an entry for each layer or frequency, in proportion."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    few_groups = 1 if groups == 1 else 2
    few_heads = few_groups * min(3, heads // groups)
    layers = LAYERS.get(config["model_type"], 2)
    small = {
        "hidden_size": few_heads * round(HEAD_DIM * config["hidden_size"] / (heads * head_dim)),
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": few_heads,
        "num_key_value_heads": few_groups,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    result = {**config, **{name: value for name, value in small.items() if name in config}}
    for name in ("layer_types", "no_rope_layers"):
        if name in config:
            result[name] = config[name][:layers]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            result[name] = _fitting(config[name], config["vocab_size"])
    if config.get("rope_scaling"):
        result["rope_scaling"] = {
            name: _thinned(value, head_dim) if isinstance(value, list) else value
            for name, value in config["rope_scaling"].items()
        }
    return result


def _fitting(token: Any, vocabulary: int) -> Any:
    """A token id at the same place of a smaller vocabulary."""
    return [_fitting(one, vocabulary) for one in token] if isinstance(token, list) else token * VOCABULARY // vocabulary


def _thinned(factors: list[float], head_dim: int) -> list[float]:
    """Factors of as many frequencies as there are now, evenly out of the published ones."""
    count = len(factors) * HEAD_DIM // head_dim
    return [factors[position * len(factors) // count] for position in range(count)]


@cache
def model_of(name: str) -> tuple[dict[str, Any], PreTrainedModel]:
    """The shrunk configuration, and transformers' model of it with random weights."""
    config = shrunk(PUBLISHED[name])
    attention = "eager" if config.get("attn_logit_softcapping") else "sdpa"
    made = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention, dtype=torch.float32).eval()
    randomise(model, seed=3)
    return config, model


def write_source(folder: Path, name: str) -> Path:
    config, model = model_of(name)
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_weights(folder, stored_tensors(model, torch.float32))
    write_tokenizer(folder)
    tokens = torch.randint(3, VOCABULARY, (28, 40), generator=torch.Generator().manual_seed(7))
    write_json(folder.parent / "tokens.json", tokens.tolist())
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(count: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(9))


def convert(source: Path, output: Path, **options: Any) -> None:
    tokens = str(source.parent / "tokens.json")
    xeco_convert.convert(source, output, calibration=tokens, calibration_tokens=1120, **options)


def by_attention() -> list[str]:
    """One model of every kind of attention: of those that are alike when shrunk, the first."""
    kinds: dict[str, str] = {}
    for name, config in PUBLISHED.items():
        kept = {field: value for field, value in shrunk(config).items() if field not in OUTSIDE_ATTENTION}
        kinds.setdefault(json.dumps(kept, sort_keys=True), name)
    return list(kinds.values())


def test_every_family_has_its_published_files() -> None:
    assert [file.stem for file in FILES] == list(supported_model_types())
    for file in FILES:
        assert {config["model_type"] for config in json.loads(file.read_text(encoding="utf-8")).values()} == {file.stem}


@pytest.mark.parametrize("name", by_attention())
@torch.no_grad()
def test_a_published_model_is_converted_exactly_at_full_width(name: str, tmp_path: Path) -> None:
    """Without --verify: all logits are compared with the source's."""
    source = write_source(tmp_path / "source", name)
    plan = make_plan(CheckpointIndex.open(source), ConvertOptions(rank=8, layers=everything(name)))
    geometry, rotary = plan.source.geometry, max(item.kind.rotary_dim for item in plan.layers)
    rank = min(geometry.cache_width, geometry.hidden_size)
    wide = {"rank": rank, "rope_dim": geometry.num_key_value_heads * rotary, "layers": everything(name)}
    convert(source, tmp_path / "out", **wide)
    expected, found = model_of(name)[1](ids(40)).logits, load(tmp_path / "out")(ids(40)).logits
    error = float((found - expected).norm() / expected.norm())
    if plan.source.family.has_key_norm:
        assert error < 0.8  # the regression's
    else:
        assert error < 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_published_model_generates_with_half_the_cache(name: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", name)
    convert(source, tmp_path / "out", kv_size="50%", rank_multiple=8, verify=True)  # few widths to choose from
    model, prompt = load(tmp_path / "out"), ids(6)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    output = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **settings)
    logits = model(output.sequences[:, :-1], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for field, value in model_of(name)[0].items():  # nothing of the published file is lost or changed
        if field not in ("model_type", "architectures", "auto_map", "torch_dtype", "_name_or_path"):
            assert written[field] == value, field


def everything(name: str) -> str:
    """--layers for all, those with a sliding window too."""
    return f"0-{model_of(name)[0]['num_hidden_layers'] - 1}"
