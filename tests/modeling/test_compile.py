"""torch.compile of a decode step: one graph, the same logits."""

from collections.abc import Callable

import pytest
import torch
from builders import random_ids
from transformers import PreTrainedModel, StaticCache


def decode(model: PreTrainedModel, step: Callable[..., torch.Tensor], ids: torch.Tensor, first: int) -> torch.Tensor:
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    model(ids[:, :first], past_key_values=cache, use_cache=True)
    logits = [step(model, ids[:, position : position + 1], cache) for position in range(first, ids.shape[1])]
    return torch.cat(logits, dim=1)


def one_step(model: PreTrainedModel, token: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    logits: torch.Tensor = model(token, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama_exact", "qwen2_low_rank_queries", "hybrid"])
def test_a_decode_step_compiles_to_one_graph(kind: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of(kind), random_ids(2, 12)
    expected = decode(model, one_step, ids, 8)
    torch.compiler.reset()
    compiled = torch.compile(one_step, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(decode(model, compiled, ids, 8), expected, rtol=1e-4, atol=1e-4)
