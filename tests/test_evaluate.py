"""The measures of fidelity agree with their formulas, whatever the chunks, and refuse what they cannot measure."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from xeco_convert.errors import CheckpointError, OptionError, VerificationError
from xeco_convert.evaluate import Fidelity, measure_fidelity, sequence_windows, token_windows
from xeco_convert.quality import OutputHead

VOCABULARY = 61


def llama(seed: int, vocab_size: int = VOCABULARY, **fields: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, **fields},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return llama(seed=1), llama(seed=2)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (5, 23), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def by_the_formula(source: nn.Module, converted: nn.Module, windows: Tensor) -> Fidelity:
    """Token by token in float64, straight from the definitions."""
    losses: tuple[list[float], list[float]] = ([], [])
    divergences, agreeing = [], 0
    for window in windows:
        p, q = (model(window[None]).logits[0].double().softmax(-1) for model in (source, converted))
        for position, target in enumerate(window[1:].tolist()):
            losses[0].append(-math.log(p[position, target]))
            losses[1].append(-math.log(q[position, target]))
            terms = zip(p[position].tolist(), q[position].tolist(), strict=True)
            divergences.append(sum(a * math.log(a / b) for a, b in terms))
            agreeing += int(p[position].argmax() == q[position].argmax())
    count = len(divergences)
    return Fidelity(
        perplexity_source=math.exp(sum(losses[0]) / count),
        perplexity=math.exp(sum(losses[1]) / count),
        kl=sum(divergences) / count,
        top1=agreeing / count,
        num_tokens=count,
        num_windows=len(windows),
    )


def assert_same(found: Fidelity, expected: Fidelity) -> None:
    # float32 logits against float64: 3e-7 was observed
    assert found.perplexity_source == pytest.approx(expected.perplexity_source, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert (found.top1, found.num_tokens, found.num_windows) == (
        expected.top1,
        expected.num_tokens,
        expected.num_windows,
    )


def test_the_measures_are_those_of_their_formulas(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    expected = by_the_formula(*models, windows)
    assert expected.kl > 0.1 and 0 < expected.top1 < 1
    found = measure_fidelity(*models, windows)
    assert_same(found, expected)
    assert found.gap == pytest.approx(math.log(found.perplexity / found.perplexity_source))


def test_kl_is_from_the_source_to_the_converted_model(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    there, back = measure_fidelity(*models, windows), measure_fidelity(*models[::-1], windows)
    assert there.kl != pytest.approx(back.kl, rel=1e-3)
    assert (there.perplexity, there.perplexity_source) == (back.perplexity_source, back.perplexity)


def test_a_model_is_identical_to_itself(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    found = measure_fidelity(models[0], models[0], windows)
    assert (found.kl, found.top1, found.gap) == (0.0, 1.0, 0.0)
    assert (found.num_tokens, found.num_windows) == (5 * 22, 5)


@pytest.mark.parametrize(("batch", "chunk"), [(1, 1), (2, 7), (3, 22), (5, 129), (100, None)])
def test_the_result_does_not_depend_on_the_chunks(
    models: tuple[nn.Module, nn.Module], windows: Tensor, batch: int, chunk: int | None
) -> None:
    found = measure_fidelity(*models, windows, windows_per_batch=batch, tokens_per_chunk=chunk)
    assert_same(found, measure_fidelity(*models, windows))


def test_no_more_logits_than_a_chunk_exist_at_once(
    models: tuple[nn.Module, nn.Module], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    logits = OutputHead.logits

    def counted(self: OutputHead, hidden: Tensor) -> Tensor:
        sizes.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(OutputHead, "logits", counted)
    measure_fidelity(*models, windows, tokens_per_chunk=9)
    assert max(sizes) == 9
    assert sum(size > 4 for size in sizes) >= 2 * (5 * 22 // 9)


def test_two_tokens_are_one_prediction(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    pair = windows[:1, :2]
    assert_same(measure_fidelity(*models, pair), by_the_formula(*models, pair))


class Capped(LlamaForCausalLM):
    """A model that soft-caps its logits after the head, as Gemma 2 does."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


def test_what_a_model_does_after_its_head_is_measured(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    capped = Capped(models[1].config).eval()
    capped.load_state_dict(models[1].state_dict())
    assert_same(measure_fidelity(models[0], capped, windows), by_the_formula(models[0], capped, windows))


def test_dropout_is_off_and_the_mode_restored(windows: Tensor) -> None:
    source, converted = llama(seed=1), llama(seed=2, attention_dropout=0.5)
    converted.train()
    converted.lm_head.eval()
    first, second = (measure_fidelity(source, converted, windows) for _ in range(2))
    assert first == second
    assert converted.training and converted.model.layers[0].training and not converted.lm_head.training
    assert not source.training


def test_bfloat16_logits_are_normalised_in_float32(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    narrow = llama(seed=2).to(torch.bfloat16)
    found = measure_fidelity(models[0], narrow, windows)
    # bfloat16 weights change the model itself: 2e-3 was observed
    assert found.perplexity == pytest.approx(measure_fidelity(*models, windows).perplexity, rel=0.02)


def test_tokens_without_any_chance_in_both_models_do_not_count(
    models: tuple[nn.Module, nn.Module], windows: Tensor
) -> None:
    class Masked(Capped):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = LlamaForCausalLM.forward(self, *args, **kwargs)
            output.logits[..., -1] = -torch.inf
            return output

    masked = [Masked(model.config).eval() for model in models]
    for copy, model in zip(masked, models, strict=True):
        copy.load_state_dict(model.state_dict())
    found = measure_fidelity(*masked, windows.clamp_max(VOCABULARY - 2))
    unmasked = measure_fidelity(*models, windows.clamp_max(VOCABULARY - 2))
    assert math.isfinite(found.kl) and 0 < found.kl != pytest.approx(unmasked.kl, rel=1e-6)


def test_a_model_that_gives_nan_is_refused(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    broken = llama(seed=2)
    with torch.no_grad():
        broken.model.layers[1].self_attn.o_proj.weight.fill_(math.nan)
    with pytest.raises(VerificationError, match=r"the converted model gives NaN.*float32"):
        measure_fidelity(models[0], broken, windows)
    with pytest.raises(VerificationError, match="the source gives NaN"):
        measure_fidelity(broken, models[0], windows)


def test_models_of_two_vocabularies_are_refused(models: tuple[nn.Module, nn.Module], windows: Tensor) -> None:
    with pytest.raises(CheckpointError, match="a vocabulary of 61, the converted model of 67"):
        measure_fidelity(models[0], llama(seed=2, vocab_size=67), windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda windows: windows[0], r"expected windows \[W, T\].*found torch.int64 \[23\]"),
        (lambda windows: windows[:0], r"found torch.int64 \[0, 23\]"),
        (lambda windows: windows[:, :1], r"at least 2 tokens each, found torch.int64 \[5, 1\]"),
        (lambda windows: windows.float(), "found torch.float32"),
        (lambda windows: windows + VOCABULARY, "expected token ids from 0 to 60, found"),
        (lambda windows: windows - VOCABULARY, "expected token ids from 0 to 60, found -"),
    ],
)
def test_what_is_no_windows_of_the_model_is_refused(
    models: tuple[nn.Module, nn.Module], windows: Tensor, change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        measure_fidelity(*models, change(windows))


@pytest.mark.parametrize("sizes", [{"windows_per_batch": 0}, {"tokens_per_chunk": 0}])
def test_empty_chunks_are_refused(models: tuple[nn.Module, nn.Module], windows: Tensor, sizes: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="expected at least 1"):
        measure_fidelity(*models, windows, **sizes)


class Letters:
    """A tokenizer of letters, which adds a special token where it is not told otherwise."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [99] * add_special_tokens + [ord(letter) - ord("a") for letter in text]}


def test_windows_are_consecutive_and_without_special_tokens() -> None:
    assert token_windows("abcdefgh", Letters(), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert token_windows("abcdefgh", Letters(), 3, 1).tolist() == [[0, 1, 2]]
    assert token_windows(list(range(9)), None, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_windows([4, 5], None, 2).dtype == torch.int64


def test_no_window_spans_two_sequences() -> None:
    found = sequence_windows([[0, 1, 2, 3, 4], [5], [6, 7]], 2)
    assert found.tolist() == [[0, 1], [2, 3], [6, 7]]
    assert sequence_windows([[0, 1, 2, 3, 4], [5], [6, 7]], 2, 2).tolist() == [[0, 1], [2, 3]]


def test_a_text_that_is_too_short_is_refused_with_its_length() -> None:
    with pytest.raises(OptionError, match=r"at least 2 windows of 5 tokens, found 1 \(8 tokens in all\)"):
        token_windows("abcdefgh", Letters(), 5, 2)
    with pytest.raises(OptionError, match=r"the text: expected at least 1 windows of 5 tokens, found 0 \(0 tokens"):
        token_windows("", Letters(), 5)
    with pytest.raises(OptionError, match="2 sequences: expected at least 1 windows of 3"):
        sequence_windows([[1, 2], [3]], 3)


def test_impossible_sizes_and_a_missing_tokenizer_are_refused() -> None:
    with pytest.raises(OptionError, match="window length: expected at least 2"):
        token_windows("abc", Letters(), 1)
    with pytest.raises(OptionError, match="number of windows: expected at least 1, found 0"):
        token_windows("abc", Letters(), 2, 0)
    with pytest.raises(OptionError, match="expected a tokenizer"):
        token_windows("abc", None, 2)
