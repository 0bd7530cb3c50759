"""Tiny converted students of every family with a tokenizer that every family's class can read, and text for them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from builders import build_checkpoint, write_json

import xeco_convert

# One or more of every family, with what healing could trip over: kept windows, NoPE, partial rotary, experts, tied heads.
KINDS = (
    "llama_tied",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3_bias",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3_partial",
    "granite",
    "smollm3",
    "olmo2",
    "gpt_neox",
    "gpt_neox_sequential",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_student(folder: Path, variant: str) -> Path:
    """`folder`/source, and `folder`/out, its conversion; beside them text.txt and pairs.jsonl."""
    source = build_checkpoint(folder / "source", variant)
    write_spelling_tokenizer(source)
    chance = random.Random(0)
    (folder / "text.txt").write_text("\n\n".join(words(chance, 16) for _ in range(40)), encoding="utf-8")
    pairs = [{"prompt": words(chance, 2), "chosen": words(chance, 1), "rejected": words(chance, 1)} for _ in range(5)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    text = str(folder / "text.txt")
    xeco_convert.convert(source, folder / "out", rank=10, rope_dim=4, calibration=text, calibration_tokens=1024)
    return folder / "out"


def words(chance: random.Random, count: int) -> str:
    return " ".join("".join(chance.choices(_LETTERS, k=chance.randint(1, 5))) for _ in range(count))


def write_spelling_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: one token a letter, whatever class transformers chooses for the family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    alphabet = [*special, *_LETTERS, "Ġ", "Ċ"]  # space and line end, as byte-level tokenizers write them
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
