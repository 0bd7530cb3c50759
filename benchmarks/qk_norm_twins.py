"""Two small models that differ in the norm of queries and keys alone, trained by the demo's trainer on the demo's language.

`python benchmarks/qk_norm_twins.py FOLDER` writes FOLDER/llama and FOLDER/qwen3: 4 layers, hidden_size 192, 6 query and 3
key/value heads of 64, the same seed, text and number of steps. Half an hour of one core each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from xeco_convert.demo import train
from xeco_convert.demo.language import generate_stories

TWINS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def untrained(kind: str, tokenizer: Any) -> Any:
    """The twin of this kind, weights drawn from torch's seed."""
    config_class, model_class = TWINS[kind]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=train.MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def train_twin(kind: str, folder: Path, options: train.Options) -> None:
    """Train one twin and write it to folder/kind."""
    stories = generate_stories(train.NUM_STORIES, options.seed)
    tokenizer = train.build_tokenizer(stories)
    stream = train.pack(stories, tokenizer, options.seed)
    torch.manual_seed(options.seed)
    model = untrained(kind, tokenizer).train()
    print(f"{kind}: {model.num_parameters()} parameters, {len(stream)} tokens of text", flush=True)
    train.rehearse(model, options)
    train.fit(model, stream, options)
    train.save(model, tokenizer, folder / kind)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description="Train twins with and without a norm of queries and keys.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=list(TWINS), default=list(TWINS))
    parser.add_argument("--steps", type=int, default=900, help="batches of stories")
    parser.add_argument(
        "--rehearsal", type=int, default=train.Options.rehearsal, help="batches of random words at first"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for kind in options.kinds:
        train_twin(
            kind, options.folder, train.Options(seed=options.seed, rehearsal=options.rehearsal, steps=options.steps)
        )


if __name__ == "__main__":
    main()
