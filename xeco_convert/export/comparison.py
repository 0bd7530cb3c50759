"""After writing: the stock class loads the folder, and its logits and greedy text are compared with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xeco_convert.errors import VerificationError

_GREEDY_TOKENS = 100
_PROMPT_TOKENS = 8
_CHECK_TOKENS = 64
# Largest difference of logits, relative to their standard deviation, by the dtype that was stored. Observed on the test
# models: 2e-5 in float32; half precision rounds the scaled weights once more.
TOLERANCES = {"F32": 1e-3, "BF16": 0.25, "F16": 0.03}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`logits_difference`: largest, relative to the logits' standard deviation. `greedy_agreement`: tokens of greedy text that
    are equal before the first that is not, of `greedy_tokens`. `cache_numbers`: cached per token and layer by the stock class."""

    logits_difference: float
    greedy_agreement: int
    greedy_tokens: int
    cache_numbers: int


@torch.no_grad()
def compare_with_stock(ours: Any, folder: Path, dtype: str, overrides: Mapping[str, Any]) -> Comparison:
    """Load `folder` with the class that transformers itself has for it, float32, and compare with our model.

    Raises `VerificationError` where logits differ by more than the dtype's rounding, or, in float32, greedy text differs.
    """
    from transformers import DeepseekV3ForCausalLM

    stock = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **overrides).eval()
    ids = _random_ids(ours, 2, min(_CHECK_TOKENS, ours.config.max_position_embeddings))
    expected = ours(ids).logits
    difference = float((stock(ids).logits - expected).abs().max() / expected.std())
    length = min(_GREEDY_TOKENS, ours.config.max_position_embeddings - _PROMPT_TOKENS)
    (own, _), (theirs, cache) = (_greedy(model, ids[:1, :_PROMPT_TOKENS], length) for model in (ours, stock))
    unequal = (own != theirs).nonzero()
    agreement = length if unequal.numel() == 0 else int(unequal[0])
    numbers = cache.layers[0].keys[0, :, 0].numel() + cache.layers[0].values[0, :, 0].numel()
    if not difference <= TOLERANCES[dtype] or (dtype == "F32" and agreement < length):
        raise VerificationError(
            f"the exported checkpoint, loaded with transformers' own class, differs from the converted model: logits by "
            f"{difference:.1e} of their standard deviation (expected at most {TOLERANCES[dtype]:.0e}), greedy text from token "
            f"{agreement} of {length}. This is a fault of the export; nothing was written. Please report it with config.json."
        )
    return Comparison(
        logits_difference=difference, greedy_agreement=agreement, greedy_tokens=length, cache_numbers=numbers
    )


def _random_ids(model: Any, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def _greedy(model: Any, prompt: Tensor, length: int) -> tuple[Tensor, Any]:
    """New tokens [length], and the cache."""
    from transformers import GenerationConfig

    settings = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0, return_dict_in_generate=True)
    model.generation_config = settings
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return output.sequences[0, prompt.shape[1] :], output.past_key_values
