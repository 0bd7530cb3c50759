"""`python -m xeco_convert.demo`: the main job on the embedded model, from conversion to text. No download."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import click

from xeco_convert.cli.convert import convert_command
from xeco_convert.commandline.run import run_command
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.errors import VerificationError

_PROMPT_TOKENS = 12
_NEW_TOKENS = 60


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="demo-output",
    show_default=True,
    help="Folder to write, replaced.",
)
@click.option("--kv-size", default="50%", show_default=True, help="Size of the KV cache as a share of the source's.")
def demo_command(output: Path, kv_size: str) -> None:
    """Convert the embedded model, then generate from source and converted model and measure both caches."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the model is so small that more threads would only wait for each other
    arguments = [str(MODEL_FOLDER), str(output), "--kv-size", kv_size, "--verify", "--overwrite"]
    click.echo(f"$ xeco-convert {' '.join(arguments)}")
    convert_command.main(args=arguments, prog_name="xeco-convert", standalone_mode=False)
    from transformers.utils import logging

    logging.disable_progress_bar()
    prompt = _prompt()
    check_generation(output, prompt)
    click.echo("\nconverted: the same text with the cache as without it, and in a batch with left padding as alone")
    for title, folder in (("source", MODEL_FOLDER), ("converted", output)):
        text, measured_bytes, num_tokens = generate(folder, prompt)
        click.echo(f"\n{title}: {text}")
        click.echo(f"{title}: {measured_bytes} bytes in the KV cache after {num_tokens} tokens")


def generate(folder: Path, prompt: str) -> tuple[str, int, int]:
    """Greedy text of the model in `folder`, the bytes its cache really holds, and the number of tokens in it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
    cache = DynamicCache(config=model.config)
    tokens = model.generate(
        **inputs,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **{_cache_argument(model): cache},
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True), cache_bytes(cache), cache.get_seq_length()


def _cache_argument(model: Any) -> str:
    """What this release of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_generation(folder: Path, prompt: str) -> None:
    """Raise `VerificationError` where greedy text of the model in `folder` depends on how it is run: with the cache or
    without it, alone or behind left padding. In float32, where rounding does not decide between tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    settings["pad_token_id"] = tokenizer.pad_token_id
    whole = tokenizer(prompt, return_tensors="pt").input_ids
    short = whole[:, : whole.shape[1] // 2]
    padding = torch.full((1, whole.shape[1] - short.shape[1]), tokenizer.pad_token_id)
    batch = torch.cat([whole, torch.cat([padding, short], dim=1)])
    mask = torch.cat([torch.ones_like(whole), torch.cat([torch.zeros_like(padding), torch.ones_like(short)], dim=1)])
    expected = [model.generate(ids, use_cache=False, **settings)[0, ids.shape[1] :] for ids in (whole, short)]
    ways = {
        "with the cache": [
            model.generate(ids, use_cache=True, **settings)[0, ids.shape[1] :] for ids in (whole, short)
        ],
        "in a batch with left padding": model.generate(batch, attention_mask=mask, **settings)[:, whole.shape[1] :],
    }
    for way, found in ways.items():
        for tokens, wanted in zip(found, expected, strict=True):
            if not torch.equal(tokens, wanted):
                raise VerificationError(
                    f"{folder}: expected the same greedy text {way} as without a cache, found {tokenizer.decode(tokens)!r} "
                    f"in place of {tokenizer.decode(wanted)!r}: attention does not read what it cached."
                )


def cache_bytes(cache: Any) -> int:
    """Bytes of the memory behind all tensors of a transformers cache, whatever part of it the tensors show."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _prompt() -> str:
    from xeco_convert.demo.language import generate_text

    return " ".join(generate_text(num_stories=1, seed=2026).split()[:_PROMPT_TOKENS])


if __name__ == "__main__":
    run_command(demo_command, sys.argv[1:], "xeco_convert.demo")
