"""The embedded model: small, loadable by plain transformers, fluent in its language, and in need of its context."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model.measure import (
    HELD_OUT_SEED,
    answer_share,
    grammatical_share,
    held_out_tokens,
    load_model,
    mean_loss,
    opening_prompts,
    write_stories,
)
from tiny_model.train import Options, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model()


@pytest.fixture(scope="module")
def tokens(loaded: Loaded) -> torch.Tensor:
    return held_out_tokens(loaded[1], num_windows=16)


def test_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_FOLDER.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 1_400_000


def test_plain_transformers_loads_it_in_bfloat16_with_grouped_queries() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, local_files_only=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.generation_config.do_sample is False
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(MODEL_FOLDER).eos_token_id


def test_tokenizer_gives_text_back_as_it_was(loaded: Loaded) -> None:
    text = generate_text(30, seed=HELD_OUT_SEED)
    ids = loaded[1](text, verbose=False)["input_ids"]
    assert loaded[1].decode(ids) == text
    assert loaded[1].unk_token_id not in ids


def test_held_out_perplexity(loaded: Loaded, tokens: torch.Tensor) -> None:
    assert math.exp(mean_loss(loaded[0], tokens)) < 2.3


def test_model_needs_more_than_the_last_eight_tokens(loaded: Loaded, tokens: torch.Tensor) -> None:
    full, short = mean_loss(loaded[0], tokens), mean_loss(loaded[0], tokens, context=8)
    assert math.exp(short) > 1.2 * math.exp(full)


def test_model_answers_questions_about_unseen_stories(loaded: Loaded) -> None:
    assert answer_share(*loaded, num_questions=60, seed=HELD_OUT_SEED) >= 0.85


def test_greedy_stories_are_grammatical(loaded: Loaded) -> None:
    prompts = opening_prompts(12, seed=HELD_OUT_SEED)
    texts = write_stories(*loaded, prompts, sample=False)
    own = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    share, count = grammatical_share(own)
    assert count >= 40
    assert share >= 0.9


@pytest.mark.slow
def test_sampled_stories_are_grammatical(loaded: Loaded) -> None:
    torch.manual_seed(0)
    share, count = grammatical_share(write_stories(*loaded, [""] * 20, sample=True))
    assert count >= 80
    assert share >= 0.9


def test_truncated_context_refuses_to_score_tokens_without_one(loaded: Loaded, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="skip"):
        mean_loss(loaded[0], tokens, context=8, skip=4)


def test_text_without_a_sentence_has_no_share() -> None:
    with pytest.raises(ValueError, match="sentence"):
        grammatical_share(["no end"])


@pytest.mark.slow
def test_training_repeats_itself_and_fits_the_language_of_the_model(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_model.train.NUM_STORIES", 1500)
    for name in ("first", "second"):
        train(tmp_path / name, Options(rehearsal=2, steps=4))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    _, tokenizer = load_model(tmp_path / "first")
    assert tokenizer.get_vocab().keys() == loaded[1].get_vocab().keys()
