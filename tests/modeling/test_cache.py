"""The cache holds the latent and the rotated rotary key, and nothing else: measured in bytes of the storages it keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import random_ids
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

BATCH, PREFILL, TOKENS = 2, 9, 21


def held_bytes(cache: Cache) -> list[int]:
    """Bytes that each layer keeps alive: whole storages, so that a view of something larger counts as what it is."""
    held = []
    for layer in cache.layers:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in (layer.keys, layer.values)
        }
        held.append(sum(storage.nbytes() for storage in storages.values()))
    return held


def fill(model: PreTrainedModel) -> Cache:
    """A cache after TOKENS tokens: some at once, then one at a time."""
    ids = random_ids(BATCH, TOKENS)
    cache = model(ids[:, :PREFILL], use_cache=True).past_key_values
    for position in range(PREFILL, TOKENS):
        cache = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
    assert cache.get_seq_length() == TOKENS
    return cache


@pytest.mark.parametrize("kind", ["llama", "llama_yarn_norm", "llama_all_rotary", "qwen2_low_rank_queries", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_bytes_are_the_numbers_of_the_configuration(
    kind: str, dtype: torch.dtype, folder_of: Callable[[str], tuple[Path, Path]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(kind)[1], dtype=dtype).eval()
    numbers = model.config.kv_cache_numbers_per_token()
    assert held_bytes(fill(model)) == [number * BATCH * TOKENS * dtype.itemsize for number in numbers]


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("llama", 16 / 32),
        ("llama_all_rotary", 24 / 64),
        ("qwen2_low_rank_queries", 16 / 32),
        ("hybrid", (16 + 32 + 16) / 96),
    ],
)
def test_held_bytes_are_the_stated_share_of_the_cache_of_the_source(
    kind: str, share: float, folder_of: Callable[[str], tuple[Path, Path]]
) -> None:
    source, converted = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folder_of(kind))
    assert sum(held_bytes(fill(converted))) / sum(held_bytes(fill(source))) == share


def test_each_layer_has_the_shapes_of_its_kind(model_of: Callable[[str], PreTrainedModel]) -> None:
    cache = fill(model_of("hybrid"))
    latent = ((BATCH, 1, TOKENS, 12), (BATCH, 1, TOKENS, 4))
    kept = ((BATCH, 2, TOKENS, 8), (BATCH, 2, TOKENS, 8))
    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [latent, kept, latent]


def test_cached_latents_are_those_of_the_down_projection(model_of: Callable[[str], PreTrainedModel]) -> None:
    """Keys hold the latent as it is; values the rotary key, rotated: unchanged at position 0, of the same length after."""
    model, ids = model_of("llama"), random_ids(1, 6)
    given: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.kv_a_proj_with_mqa.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    cache = model(ids, use_cache=True).past_key_values
    hook.remove()
    latent, rotary = given[0].split([12, 4], dim=-1)
    torch.testing.assert_close(cache.layers[0].keys[:, 0], latent, rtol=0, atol=0)
    torch.testing.assert_close(cache.layers[0].values[:, 0, :1], rotary[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(cache.layers[0].values[:, 0].norm(dim=-1), rotary.norm(dim=-1))
    assert not torch.allclose(cache.layers[0].values[:, 0, 1:], rotary[:, 1:])


@pytest.mark.parametrize("kind", ["mistral_window", "qwen2_window"])
def test_sliding_layers_keep_no_more_than_their_window(kind: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    lengths = [layer.keys.shape[-2] for layer in fill(model_of(kind)).layers]
    first = TOKENS if kind == "qwen2_window" else 6
    assert lengths == [first, 6, 6]  # window 7: the query itself and the six tokens before it
