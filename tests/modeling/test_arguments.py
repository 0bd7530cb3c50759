"""Whatever transformers hands to attention is used, known to be of no bearing, or refused: nothing is swallowed."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VARIANTS, WITHOUT_PACKAGE, exact_model, random_ids, source_model
from fresh import run_fresh
from transformers import AttentionInterface, Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from xeco_convert.modeling import LatentSelfAttention
from xeco_convert.modeling.arguments_xeco import OF_NO_BEARING, USED, cache_among, is_cache

CACHE_NAMES = ("past_key_values", "cache", "layer_past", "past_key_value", "some_later_name")
# From transformers' own lists of what may be passed on; the rest of them is of no bearing.
REFUSED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What continuous batching hands to a model besides the ids (either end of the supported releases).
PAGED = (
    "block_table",
    "read_index",
    "write_index",
    "max_seqlen_q",
    "max_seqlen_k",
    "logits_indices",
    "logits_processor_args",
)


class CacheOfAnother:
    """No subclass of Cache, but used as one."""

    def __init__(self) -> None:
        self.inner = DynamicCache()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self.inner.update(keys, values, layer)
        return found

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length()


def attention_of(model: PreTrainedModel) -> LatentSelfAttention:
    return next(module for module in model.modules() if isinstance(module, LatentSelfAttention))


def call(attention: LatentSelfAttention, tokens: int = 5, **named: Any) -> torch.Tensor:
    """One call of the module as a decoder layer makes it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, attention.o_proj.out_features, generator=generator)
    table = torch.rand(1, tokens, 64, generator=generator)
    positions = torch.arange(tokens)[None]
    found: torch.Tensor = attention(
        hidden, position_embeddings=(table, table), attention_mask=None, position_ids=positions, **named
    )[0]
    return found


@pytest.fixture(scope="module", params=VARIANTS)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The exact form of every kind of source."""
    return exact_model(source_model(request.param))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("make", [DynamicCache, CacheOfAnother])
def test_a_cache_is_found_under_any_name(name: str, make: type, model_of: Callable[[str], PreTrainedModel]) -> None:
    attention, cache = attention_of(model_of("llama_exact")), make()
    out = call(attention, **{name: cache, "use_cache": True})
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(out, call(attention))


def test_arguments_without_names_are_taken_in_the_order_of_the_source(any_model: PreTrainedModel) -> None:
    """GPT-NeoX has the mask first; others the rotary tables; the cache stands where each has it."""
    attention = attention_of(any_model)
    hidden = torch.randn(1, 5, attention.o_proj.out_features, generator=torch.Generator().manual_seed(0))
    table = torch.rand(1, 5, 64)
    given = {"position_embeddings": (table, table), "attention_mask": None, "position_ids": torch.arange(5)[None]}
    expected = attention(hidden, **given)[0]
    source = type(attention).__mro__[2]  # behind the class itself and LatentSelfAttention
    order = list(inspect.signature(source.forward).parameters)[2:-1]  # without self, hidden states and **kwargs
    cache = DynamicCache()
    positional = [given.pop(name) if name in given else cache for name in order]
    assert sum(value is cache for value in positional) == 1
    torch.testing.assert_close(attention(hidden, *positional, **given)[0], expected)
    assert cache.get_seq_length() == 5


def test_a_cache_that_was_asked_for_must_come(model_of: Callable[[str], PreTrainedModel]) -> None:
    attention = attention_of(model_of("llama_exact"))
    with pytest.raises(ValueError, match=r"layer 0: use_cache is asked for, but no cache is among the arguments"):
        call(attention, use_cache=True, cache=None)
    call(attention, use_cache=False)


@pytest.mark.parametrize(
    "name", [*REFUSED, *PAGED, "attention_instances", "position_bias", "head_mask", "no_such_thing"]
)
@pytest.mark.parametrize("value", [torch.zeros(2, dtype=torch.int32), 4, [], {"a": 1}, True], ids=type)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    name: str, value: Any, model_of: Callable[[str], PreTrainedModel]
) -> None:
    attention = attention_of(model_of("llama_exact"))
    with pytest.raises(ValueError, match=f"layer 0: attention over latents cannot honour {name}; expected"):
        call(attention, **{name: value})
    for nothing in (None, False):
        call(attention, **{name: nothing})


def test_refusals_reach_the_user_from_every_family(any_model: PreTrainedModel) -> None:
    for name in (*REFUSED, *PAGED):
        with pytest.raises(ValueError, match=f"cannot honour {name}"):
            any_model(random_ids(1, 4), **{name: torch.tensor([0, 4], dtype=torch.int32)})


def test_bidirectional_attention_and_tuples_of_tensors_are_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    attention = attention_of(model_of("llama_exact"))
    call(attention, is_causal=True)
    with pytest.raises(ValueError, match="cannot honour is_causal=False"):
        call(attention, is_causal=False)
    with pytest.raises(ValueError, match="cannot honour past_key_values"):  # as transformers 4 once had it
        call(attention, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(ValueError, match="cannot honour cache"):
        call(attention, past_key_values=DynamicCache(), cache=DynamicCache())


def test_every_name_on_transformers_own_lists_is_known() -> None:
    names = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert names - {*USED, *OF_NO_BEARING} == set(REFUSED)
    assert not {*USED} & {*OF_NO_BEARING} and all(OF_NO_BEARING.values())


def test_what_is_a_cache() -> None:
    assert is_cache(DynamicCache()) and is_cache(CacheOfAnother()) and issubclass(DynamicCache, Cache)
    assert not any(is_cache(value) for value in ({}, {1: 2}, set(), torch.zeros(1), None, True, [], "cache"))
    cache = DynamicCache()
    assert cache_among({"past_key_values": cache, "layer_past": cache}, 0) is cache


def test_all_that_reaches_attention_is_let_through_where_it_should(any_model: PreTrainedModel) -> None:
    """Loss, hidden states, weights, segments, generation in all its ways: no refusal, and nothing but known names."""
    reached: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, named: reached.update(named), with_kwargs=True)
        for module in any_model.modules()
        if isinstance(module, LatentSelfAttention)
    ]
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    segments = torch.zeros_like(ids)
    named = {"num_items_in_batch": torch.tensor(16), "output_hidden_states": True, "output_attentions": True}
    any_model(ids, attention_mask=mask, labels=ids, token_type_ids=segments, ignore_index=-100, **named)
    any_model(ids, shift_labels=ids, labels=ids, return_dict=True)
    any_model(ids, logits_to_keep=1, use_cache=True)
    any_model(torch.cat([ids, ids], dim=1)[:1], position_ids=torch.arange(9).repeat(2)[None])  # packed
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 3}
    ways: list[dict[str, Any]] = [
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    ]
    for way in ways:
        any_model.generate(ids, attention_mask=mask, **settings, **way)
    any_model.generate(ids[:1], attention_mask=mask[:1], prompt_lookup_num_tokens=2, **settings)
    for hook in hooks:
        hook.remove()
    assert reached <= {"hidden_states", *USED, *OF_NO_BEARING, *CACHE_NAMES}
    assert {"attention_mask", "position_ids", "position_embeddings"} <= reached


def enter(model: Any) -> None:
    with model.continuous_batching_context_manager():
        pass


@pytest.mark.parametrize(
    "entry",
    [
        lambda model: model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=4)),
        lambda model: model.generate(random_ids(1, 4), cache_implementation="paged", max_new_tokens=4),
        lambda model: model.init_continuous_batching(),
        enter,
    ],
    ids=["generate_batch", "paged cache", "init_continuous_batching", "context manager"],
)
def test_continuous_batching_is_refused_at_once(
    entry: Callable[[Any], Any], model_of: Callable[[str], PreTrainedModel]
) -> None:
    model: Any = model_of("llama")
    sentence = "XecoLlamaForCausalLM: continuous batching keeps the cache in pages .* use model.generate"
    with pytest.raises((ValueError, AttributeError), match=sentence):
        entry(model)
    assert not hasattr(model, "init_continuous_batching")  # which transformers serve looks at before it decides


def test_attention_implementations_that_would_be_passed_by_are_refused(
    model_of: Callable[[str], PreTrainedModel],
) -> None:
    model = model_of("llama")
    AttentionInterface.register("attention_of_a_user", lambda *_: None)
    paged = [
        name for name in ("paged|sdpa", "paged|eager") if name in AttentionInterface.valid_keys(AttentionInterface())
    ]
    for name in ("attention_of_a_user", *paged):
        with pytest.raises(ValueError, match="attn_implementation: expected sdpa or eager for XecoLlamaForCausalLM"):
            model.get_correct_attn_implementation(name)
    for name in ("sdpa", "eager"):
        assert model.get_correct_attn_implementation(name) == name


REMOTE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(3, 12)[None]
settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=12)
assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
for refused in (lambda: model(ids, cu_seq_lens_q=torch.tensor([0, 9])), lambda: model.generate_batch([[3, 4]])):
    try:
        refused()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_remote_code_reads_its_cache_and_refuses_the_same(converted: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = run_fresh(WITHOUT_PACKAGE + REMOTE, str(converted), environment=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "cannot honour cu_seq_lens_q" in first and "continuous batching keeps the cache in pages" in second
