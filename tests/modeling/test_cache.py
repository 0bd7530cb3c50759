"""The cache holds the latent and the rotated rotary key, and nothing else: measured in bytes of the storages it keeps."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact_model, random_ids, source_model
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache, cache_utils
from transformers.cache_utils import DynamicLayer, QuantizedLayer

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


class Exact(QuantizedLayer):
    """Stores what it is given through the door of quantised caches, which has no room for tensors without numbers."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        assert tensor.numel() > 0
        return tensor.clone()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor


class Int8(Exact):
    """The same in 8 bits, one scale for a tensor."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax() / 127  # which has no value for a tensor without numbers
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        stored: torch.Tensor = q_tensor[0] * q_tensor[1]
        return stored


class OwnCache(DynamicCache):
    """A subclass of somebody else's."""


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "without a configuration": lambda _: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=TOKENS),
    "quantised": lambda model: Cache(layers=[Exact() for _ in range(model.config.num_hidden_layers)]),
    "of a subclass": lambda model: OwnCache(config=model.config),
}


@pytest.fixture(scope="module", params=["smollm3", "llama"])
def partly_without_rotation(request: pytest.FixtureRequest) -> PreTrainedModel:
    """SmolLM3 has layers without rotation, which have no rotary key to cache; and a model that rotates everywhere."""
    return exact_model(source_model(request.param))


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_gives_the_logits_of_none(kind: str, partly_without_rotation: PreTrainedModel) -> None:
    model, ids = partly_without_rotation, random_ids(BATCH, TOKENS)
    cache, found = CACHES[kind](model), []
    for chunk in ids.split([PREFILL, 1, 1, 3, *[1] * (TOKENS - PREFILL - 5)], dim=1):
        found.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    expected = model(ids, use_cache=False).logits
    assert (torch.cat(found, dim=1) - expected).abs().max() / expected.std() < 2e-5
    assert int(cache.get_seq_length()) == TOKENS


@pytest.mark.parametrize("kind", CACHES)
def test_no_kind_of_cache_holds_more_numbers_for_a_layer_without_rotation(kind: str) -> None:
    model = exact_model(source_model("smollm3"))
    cache = CACHES[kind](model)
    model(random_ids(BATCH, TOKENS), past_key_values=cache, use_cache=True)
    stored = [
        (layer._quantized_keys, layer._quantized_values) if isinstance(layer, Exact) else (layer.keys, layer.values)
        for layer in cache.layers
    ]
    numbers = model.config.kv_cache_numbers_per_token()
    assert [keys.numel() + values.numel() for keys, values in stored] == [n * BATCH * TOKENS for n in numbers]


def test_a_cache_in_eight_bits_stays_close(partly_without_rotation: PreTrainedModel) -> None:
    model, ids = partly_without_rotation, random_ids(BATCH, TOKENS)
    cache, found = Cache(layers=[Int8() for _ in range(model.config.num_hidden_layers)]), []
    for chunk in ids.split([PREFILL] + [1] * (TOKENS - PREFILL), dim=1):
        found.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    expected = model(ids, use_cache=False).logits
    error = (torch.cat(found, dim=1) - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.03  # 0.008 was observed


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no cache in 8-bit floats"
)
def test_generation_with_the_quantised_cache_of_transformers(partly_without_rotation: PreTrainedModel) -> None:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}
    quantised = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    ids = random_ids(BATCH, PREFILL)
    out = partly_without_rotation.generate(ids, attention_mask=torch.ones_like(ids), **settings, **quantised)
    assert out.shape == (BATCH, PREFILL + 5)


@pytest.mark.parametrize(("kind", "widths"), [("bit_planes", (6 + 2, 6 + 2)), ("four_bits", (6 + 2, 4 + 2))])
def test_codes_take_the_bytes_that_the_configuration_counts(
    kind: str, widths: tuple[int, int], model_of: Callable[[str], PreTrainedModel]
) -> None:
    model = model_of(kind)
    cache = model(random_ids(2, 7), use_cache=True).past_key_values
    sizes = [(layer.keys, layer.values) for layer in cache.layers]
    held = [sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in pair) for pair in sizes]
    layers, numbers = [model.config.layer(index) for index in range(3)], model.config.kv_cache_numbers_per_token()
    assert held == [4 * numbers[index] if layer is None else layer.cache_bytes(4) for index, layer in enumerate(layers)]
    keys, values = sizes[0]
    assert keys.dtype == values.dtype == torch.uint8 and (keys.shape[3], values.shape[3]) == widths


@pytest.mark.parametrize("kind", ["bit_planes", "four_bits"])
def test_a_cache_that_would_quantise_codes_again_is_refused(
    kind: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    class Quantizing(QuantizedLayer):  # transformers' own needs a package to quantise with
        _quantize = _dequantize = None
        cumulative_length = 0

        def __init__(self) -> None:
            DynamicLayer.__init__(self)

    cache = Cache(layers=[Quantizing() for _ in range(3)])
    with pytest.raises(ValueError, match=r"layer 0: this model caches codes of its own .*found a quantised cache"):
        model_of(kind)(random_ids(1, 5), past_key_values=cache, use_cache=True)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("kind", ["bit_planes", "four_bits"])
def test_gradients_pass_through_codes_with_a_cache_and_without(
    kind: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model, ids = copy.deepcopy(model_of(kind)), random_ids(2, 9)
    weight = model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight
    gradients = []
    for use_cache in (False, True):
        loss = model(ids, labels=ids, use_cache=use_cache).loss
        gradients += torch.autograd.grad(loss, weight)
    assert float(gradients[0].norm()) > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.usefixtures("gradients")
def test_gradients_of_the_queries_alone_pass_a_cache_of_codes(model_of: Callable[[str], PreTrainedModel]) -> None:
    """As LoRA on the queries has them: what is cached needs none. Layers below read codes in the kernel, one way of two."""
    model, ids = copy.deepcopy(model_of("bit_planes")).requires_grad_(False), random_ids(2, 9)
    weight = model.model.layers[2].self_attn.q_proj.weight.requires_grad_()
    gradients = [torch.autograd.grad(model(ids, labels=ids, use_cache=use).loss, weight)[0] for use in (False, True)]
    assert float(gradients[0].norm()) > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2 * float(gradients[0].abs().max()))


@pytest.mark.usefixtures("gradients")
def test_gradients_through_a_static_cache_of_codes_are_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("bit_planes")
    with pytest.raises(ValueError, match="layer 0: gradients do not pass a static cache of codes"):
        model(random_ids(1, 5), past_key_values=StaticCache(config=model.config, max_cache_len=8), use_cache=True)
