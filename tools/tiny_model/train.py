"""Training of the tiny model from scratch: ``python tools/tiny_model/train.py --output DIR --seed 0``.

The result depends only on the seed, the number of steps and the number of threads (on one kind of machine).
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xeco_convert.demo.language import generate_stories

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
SEQUENCE_LENGTH, BATCH = 256, 8
REHEARSAL_LENGTH, REHEARSAL_BATCH = 64, 64
MAX_POSITIONS = 512
NUM_STORIES = 60_000
# The other windows start anywhere, so that the model can also read a prompt that does not start with bos.
START_AT_BOS = 0.5


@dataclass(frozen=True)
class Options:
    """How to train: the seed, the numbers of batches of the rehearsal and of the stories, the peak learning rate."""

    seed: int = 0
    rehearsal: int = 350
    steps: int = 1800
    peak: float = 3e-3


def build_tokenizer(stories: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word level tokenizer that knows the words of ``stories``; a space is a part of the word after it.

    It adds no special tokens by itself, and ``decode(encode(text)) == text`` for text of the language, blank lines
    between stories included.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    # The first word of a text or of a story gets a space too, so that it is the same token as elsewhere.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace("\n\n", "\n\n▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n\n|\n|[.,?]|▁?[^▁.,?\n]+|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.Fuse(),
            decoders.Replace("\n\n ", "\n\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.WordLevelTrainer(special_tokens=[BOS, EOS, PAD, UNK], show_progress=False)
    tokenizer.train_from_iterator(chain(stories, ["\n\n"]), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def settings_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What config.json says of every model that is trained here, whatever its widths."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": 0.04,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama model with 4 heads and 2 key/value heads in each of 4 layers, for ``tokenizer``."""
    config = LlamaConfig(
        **settings_of(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=100,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def pack(stories: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """All stories as one row of token ids ``(tokens,)``.

    One to four stories, separated by blank lines, make a text, and each text stands between bos and eos.
    """
    rng, ids, start = random.Random(seed), list[int](), 0
    while start < len(stories):
        size = rng.choice((1, 1, 2, 4))
        text = "\n\n".join(stories[start : start + size])
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        start += size
    return torch.tensor(ids)


def draw_batch(
    stream: torch.Tensor, starts: torch.Tensor, size: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """``size`` windows ``(size, length + 1)`` of ``stream``, about half of them from one of ``starts`` on."""
    last = len(stream) - length - 1
    anywhere = torch.randint(last, (size,), generator=generator)
    at_bos = starts[torch.randint(len(starts), (size,), generator=generator)].clamp(max=last)
    begin = torch.where(torch.rand(size, generator=generator) < START_AT_BOS, at_bos, anywhere)
    return stream[begin[:, None] + torch.arange(length + 1)]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """The rate at ``step``: a linear warm-up, then a cosine down to a fiftieth of ``peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def repeated_words(vocabulary: int, size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Random words told over and over: token ids ``(size, length)``, and the targets, -100 where one cannot know."""
    period = torch.randint(length // 4, length // 2 + 1, (size, 1), generator=generator)
    words = torch.randint(vocabulary, (size, length + 1), generator=generator)
    place = torch.arange(length + 1)
    tokens = words.gather(1, place % period)
    return tokens[:, :-1], torch.where(place[1:] < period, -100, tokens[:, 1:])


def rehearse(model: LlamaForCausalLM, options: Options) -> None:
    """Train ``model`` in place to look up what followed the same word earlier.

    A model of this size learns that from stories too, but only in many times the steps, and until then its attention
    carries little: random words can be learnt in no other way, and make the attention heads for it in minutes.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = build_optimizer(model)
    for step in range(options.rehearsal):
        tokens, targets = repeated_words(model.config.vocab_size, REHEARSAL_BATCH, REHEARSAL_LENGTH, generator)
        loss = train_step(model, tokens, targets, optimizer, options.peak * min(1.0, (step + 1) / 50))
        report("rehearsal", step, options.rehearsal, loss)


def fit(model: LlamaForCausalLM, stream: torch.Tensor, options: Options) -> None:
    """Train ``model`` in place on the texts in ``stream``."""
    starts = (stream == model.config.bos_token_id).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = build_optimizer(model)
    for step in range(options.steps):
        # Every fourth batch is half as many windows of twice the length, so that the later positions are trained too.
        factor = MAX_POSITIONS // SEQUENCE_LENGTH if step % 4 == 3 else 1
        windows = draw_batch(stream, starts, BATCH // factor, SEQUENCE_LENGTH * factor - 1, generator)
        rate = learning_rate(step, options.steps, options.peak)
        loss = train_step(model, windows[:, :-1], windows[:, 1:], optimizer, rate)
        report("stories", step, options.steps, loss)


def train_step(
    model: LlamaForCausalLM, tokens: torch.Tensor, targets: torch.Tensor, optimizer: torch.optim.Optimizer, rate: float
) -> float:
    """One update on ``tokens`` and ``targets`` ``(batch, length)`` at learning rate ``rate``; returns the loss before."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def report(phase: str, step: int, steps: int, loss: float) -> None:
    """Print the loss of every fiftieth step and of the last."""
    if step % 50 == 0 or step == steps - 1:
        print(f"{phase} step {step} loss {loss:.4f} cpu seconds {time.process_time():.0f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer to ``folder``.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # The name that every version of transformers knows, not the one that the newest writes.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train(output: Path, options: Options) -> None:
    """Train tokenizer and model, and write them to ``output``.

    Raises:
        OSError: ``output`` cannot be written.
    """
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    stories = generate_stories(NUM_STORIES, options.seed)
    tokenizer = build_tokenizer(stories)
    model = build_model(tokenizer)
    stream = pack(stories, tokenizer, options.seed)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} words, {len(stream)} tokens of text", flush=True)
    model.train()
    rehearse(model, options)
    fit(model, stream, options)
    save(model, tokenizer, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description="Train the tiny model.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of stories, weights and batches")
    parser.add_argument("--rehearsal", type=int, default=Options.rehearsal, help="batches of random words at first")
    parser.add_argument("--steps", type=int, default=Options.steps, help="batches of stories")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train(options.output, Options(options.seed, options.rehearsal, options.steps))


if __name__ == "__main__":
    main()
