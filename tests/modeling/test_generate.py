"""Generation with converted models: every strategy and cache of transformers gives what it gives without a cache."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import random_ids, source_model
from transformers import DynamicCache, PreTrainedModel, StaticCache, pipeline, set_seed

NEW_TOKENS = 12
# Random models may end at once; the special tokens are of no interest here.
ENDLESS: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS}


def generate(model: PreTrainedModel, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    output: torch.Tensor = model.generate(ids, attention_mask=mask, **{**ENDLESS, "do_sample": False, **settings})
    return output


def test_greedy_generation_needs_no_cache_to_be_the_same(model: PreTrainedModel) -> None:
    ids = random_ids(3, 10)
    with_cache = generate(model, ids)
    assert with_cache.shape == (3, 10 + NEW_TOKENS)
    assert torch.equal(with_cache, generate(model, ids, use_cache=False))


def test_sampling_follows_the_seed(model: PreTrainedModel) -> None:
    ids = random_ids(3, 10)
    outputs = []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        set_seed(seed)
        outputs.append(generate(model, ids, do_sample=True, use_cache=use_cache, temperature=1.5, top_k=0))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_beam_search_needs_no_cache_to_be_the_same(model: PreTrainedModel) -> None:
    ids = random_ids(2, 10)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found = generate(model, ids, **beams)
    assert found.shape[0] == 4
    assert torch.equal(found, generate(model, ids, use_cache=False, **beams))


def test_left_padded_batches_equal_their_rows_alone(model: PreTrainedModel) -> None:
    lengths = (10, 4, 1)
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, -row.shape[1] :] = row[0]
        mask[number, -row.shape[1] :] = 1
    together = generate(model, ids, attention_mask=mask)[:, max(lengths) :]
    alone = torch.cat([generate(model, row)[:, row.shape[1] :] for row in rows])
    assert torch.equal(together, alone)


def test_a_static_cache_equals_a_dynamic_one(model: PreTrainedModel) -> None:
    ids = random_ids(2, 10)
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


def test_a_static_cache_holds_the_latent_widths(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(random_ids(2, 5), past_key_values=cache, use_cache=True)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 32, 12)] * 3
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(2, 1, 32, 4)] * 3


@pytest.mark.parametrize(
    "kind", ["llama", "llama_exact", "qwen2_low_rank_queries", "hybrid", "bit_planes", "four_bits"]
)
def test_assisted_generation_equals_plain_greedy(kind: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of(kind), random_ids(1, 10)
    assistant = source_model("llama", seed=5)
    assert torch.equal(generate(model, ids, assistant_model=assistant), generate(model, ids))


def test_a_converted_model_can_assist_its_source(model_of: Callable[[str], PreTrainedModel]) -> None:
    source, ids = source_model("llama", "llama3"), random_ids(1, 10)
    assert torch.equal(generate(source, ids, assistant_model=model_of("llama_exact")), generate(source, ids))


def test_prompt_lookup_equals_plain_greedy(model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of("llama"), random_ids(1, 6).repeat(1, 4)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


def test_prefill_in_chunks_equals_prefill_at_once(model: PreTrainedModel) -> None:
    ids = random_ids(2, 17)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))


def test_generation_goes_on_from_a_cache_of_an_earlier_turn(model: PreTrainedModel) -> None:
    ids = random_ids(1, 20)
    cache = DynamicCache(config=model.config)
    model(ids[:, :13], past_key_values=cache, use_cache=True)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))


def test_embeddings_may_take_the_place_of_ids(model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of("llama"), random_ids(2, 9)
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    found = model.generate(inputs_embeds=embedded, attention_mask=mask, do_sample=False, **ENDLESS)
    assert torch.equal(found, generate(model, ids)[:, 9:])


def test_bfloat16_models_generate(model: PreTrainedModel) -> None:
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    output = generate(rounded, random_ids(2, 10), return_dict_in_generate=True, output_logits=True)
    assert output.sequences.shape == (2, 10 + NEW_TOKENS)
    assert all(bool(logits.isfinite().all()) for logits in output.logits)
    attention = [layer.self_attn for layer in rounded.model.layers]
    kept = [torch.uint8 if getattr(each, "is_packed", False) else torch.bfloat16 for each in attention]
    assert [layer.keys.dtype for layer in output.past_key_values.layers] == kept


def test_the_text_generation_pipeline_takes_a_converted_folder(converted: Any) -> None:
    writer = pipeline("text-generation", model=str(converted), device="cpu")
    (answer,) = writer("w5 w6 w7", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("w5 w6 w7w")
