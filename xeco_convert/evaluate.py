"""How close a converted model is to its source: perplexity of both, KL divergence and top-1 agreement on windows of tokens.

Letters: W windows, T tokens of a window, X hidden_size, V vocabulary. Each window gives T - 1 predictions. No padding takes
part: a window is T tokens of text, and every prediction counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xeco_convert.errors import CheckpointError, OptionError
from xeco_convert.quality import Fidelity, FidelitySums, OutputHead, prediction_sums

__all__ = ["Fidelity", "measure_fidelity", "sequence_windows", "token_windows"]

# Logits of one chunk, in numbers (64 MiB in float32). A few such matrices live at a time; a window of 2048 tokens over a
# vocabulary of 128k would be 1 GiB for each of them.
_LOGITS_PER_CHUNK = 2**24
_PROBE_TOKENS = 4


def token_windows(text: str | Sequence[int], tokenizer: Any, length: int, num: int | None = None) -> Tensor:
    """The first `num` consecutive windows [num, length] (int64) of a raw text, without special tokens; None takes all.

    `text` is a string for `tokenizer` (a transformers tokenizer), or token ids, for which it may be None. What is left over
    behind the last whole window is not used. Raises `OptionError` where a size is out of range or the text too short.
    """
    if not isinstance(text, str):
        return _windows([text], length, num, what="the text")
    if tokenizer is None:
        raise OptionError(
            "token windows: expected a tokenizer for a text, found none; give one, or token ids instead of text."
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _windows([ids], length, num, what="the text")


def sequence_windows(sequences: Sequence[Sequence[int]], length: int, num: int | None = None) -> Tensor:
    """The first `num` windows [num, length] (int64) of separate token sequences; no window spans two of them.

    Raises `OptionError` as `token_windows` does.
    """
    return _windows(sequences, length, num, what=f"{len(sequences)} sequences")


def _windows(sequences: Sequence[Sequence[int]], length: int, num: int | None, what: str) -> Tensor:
    if length < 2:
        raise OptionError(
            f"window length: expected at least 2 tokens (one prediction), found {length}; change the value."
        )
    if num is not None and num < 1:
        raise OptionError(f"number of windows: expected at least 1, found {num}; change the value.")
    windows = [ids[start : start + length] for ids in sequences for start in range(0, len(ids) - length + 1, length)]
    if len(windows) < (num or 1):
        raise OptionError(
            f"{what}: expected at least {num or 1} windows of {length} tokens, found {len(windows)} "
            f"({sum(map(len, sequences))} tokens in all); give a longer text, or fewer or shorter windows."
        )
    return torch.tensor(windows[:num], dtype=torch.int64)


@torch.no_grad()
def measure_fidelity(
    source: nn.Module,
    converted: nn.Module,
    windows: Tensor,
    *,
    windows_per_batch: int = 4,
    tokens_per_chunk: int | None = None,
) -> Fidelity:
    """Compare two causal language models of transformers on `windows` [W, T] (int64, on any device).

    Each model computes on its own device in its own dtype; logits are taken to float32 and sums to float64. Memory is
    bounded by the hidden states of `windows_per_batch` windows and the logits of `tokens_per_chunk` predictions (None: 64 MiB
    of them); neither changes the result beyond rounding. Raises `OptionError` for windows that are no [W, T] of token ids
    of the models, `CheckpointError` for models of different vocabularies, `VerificationError` where a model gives NaN.
    """
    _check_windows(windows, source, converted)
    if windows_per_batch < 1 or (tokens_per_chunk is not None and tokens_per_chunk < 1):
        raise OptionError("windows_per_batch and tokens_per_chunk: expected at least 1; change the value.")
    chunk = tokens_per_chunk or max(1, _LOGITS_PER_CHUNK // _vocabulary(source))
    totals = FidelitySums()
    with _in_evaluation(source), _in_evaluation(converted):
        pair = _Logits(source, windows), _Logits(converted, windows)
        if any(logits.whole for logits in pair):
            windows_per_batch = 1
        for batch in torch.split(windows, windows_per_batch):
            hidden = [logits.states(batch)[:, :-1].flatten(0, 1) for logits in pair]
            targets_of_batch = batch[:, 1:].flatten()
            pieces = zip(*(torch.split(part, chunk) for part in (*hidden, targets_of_batch)), strict=True)
            for source_states, states, targets in pieces:
                totals.add(prediction_sums(pair[0].logits(source_states), pair[1].logits(states), targets))
    return totals.fidelity(num_windows=windows.shape[0])


class _Logits:
    """A model in two halves, its body and its head, so that logits need never exist for a whole window.

    Where the model's own forward does something to the head's output that its family does not say, a probe of a few tokens
    shows it, and whole windows go through the forward: `whole`.
    """

    def __init__(self, model: Any, windows: Tensor) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        # a head that is wrapped (LoRA, quantised) has no weight that stands for it
        self.whole = type(model.get_output_embeddings()) is not nn.Linear
        if self.whole:
            return
        self._head = OutputHead.of_model(model)
        probe = windows[:1, :_PROBE_TOKENS]
        expected = self._call(model, probe).logits.float()
        logits = self._head.logits(self.states(probe)).float()
        # Both compute the same products, in batches of different shapes: one part in a hundred is far above their rounding.
        scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
        self.whole = not torch.allclose(logits, expected, rtol=0.01, atol=0.01 * scale)

    def states(self, windows: Tensor) -> Tensor:
        """[B, T] ids -> what `logits` takes for every position: hidden states [B, T, X], or logits [B, T, V] if `whole`."""
        if self.whole:
            return self._call(self._model, windows).logits  # type: ignore[no-any-return]
        return self._call(self._model.get_decoder(), windows).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [N, V] of the states of N positions."""
        return states if self.whole else self._head.logits(states)

    def _call(self, module: Any, windows: Tensor) -> Any:
        return module(input_ids=windows.to(self._device), use_cache=False)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Dropout off, and the mode of every module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _check_windows(windows: Tensor, source: nn.Module, converted: nn.Module) -> None:
    size, converted_size = _vocabulary(source), _vocabulary(converted)
    if size != converted_size:
        raise CheckpointError(
            f"fidelity: the source has a vocabulary of {size}, the converted model of {converted_size}, expected the same; "
            "compare a model with its own source."
        )
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.int64:
        raise OptionError(
            f"fidelity: expected windows [W, T] of int64 token ids with at least 2 tokens each, found {windows.dtype} "
            f"{list(windows.shape)}; make them with token_windows."
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= size:
        raise OptionError(
            f"fidelity: expected token ids from 0 to {size - 1}, found {low if low < 0 else high}; "
            "use the tokenizer of this model."
        )
