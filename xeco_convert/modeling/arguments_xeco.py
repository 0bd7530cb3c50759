"""What transformers hands to attention besides the tensors: which of it is used, which concerns others, what is refused.

Attention takes arguments by name, and a name that nobody reads is swallowed without a word. So every name is known here.
This file is also written beside the weights of converted checkpoints; it needs transformers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache

USED = ("position_embeddings", "attention_mask", "position_ids")
# What reaches attention in some family or call, and has no meaning for it.
OF_NO_BEARING = {
    "use_cache": "answered by the cache that comes with it",
    "is_causal": "attention is causal; False is refused",
    "output_attentions": "weights are taken from what attention returns",
    "output_hidden_states": "taken from what layers return",
    "output_router_logits": "taken from what experts return",
    "return_dict": "the form of the model's output",
    "labels": "for the loss",
    "shift_labels": "for the loss",
    "ignore_index": "for the loss",
    "num_items_in_batch": "for the loss",
    "logits_to_keep": "for the head",
    "token_type_ids": "segments of a text, which these decoders do not tell apart",
    "mm_token_type_ids": "the same",
    "cache_position": "of older code; position_ids say where tokens stand, and a cache knows how many it holds",
}


def cache_among(named: Mapping[str, Any], layer_idx: int) -> Any:
    """The cache, found by what it is: releases of transformers and families call it past_key_values, cache or layer_past.

    Raises `ValueError` for what would be swallowed: other places of cached tokens than a cache (block tables, the pages of
    continuous batching), other borders between sequences than a mask (cu_seq_lens), and all that is unknown; and where
    use_cache is asked for without a cache.
    """
    cache, refused = None, []
    for name, value in named.items():
        if is_cache(value) and (cache is None or cache is value):
            cache = value
        elif name == "is_causal" and value is False:
            refused.append("is_causal=False")
        elif value is not None and value is not False and name not in USED and name not in OF_NO_BEARING:
            refused.append(name)
    if refused:
        raise ValueError(
            f"layer {layer_idx}: attention over latents cannot honour {', '.join(refused)}; expected {', '.join(USED)} and one "
            "cache of transformers. Give packed sequences as position_ids that start again at 0, and generate with "
            "model.generate: continuous batching and paged caches are not supported"
        )
    if cache is None and named.get("use_cache"):
        raise ValueError(
            f"layer {layer_idx}: use_cache is asked for, but no cache is among the arguments ({', '.join(named)}); give one, or "
            "use_cache=False"
        )
    return cache


def is_cache(value: Any) -> bool:
    """A cache of transformers, or what does as one."""
    return isinstance(value, Cache) or (
        callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))
    )
