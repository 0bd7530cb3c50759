"""Measurements of the tiny model: perplexity, grammar of what it writes, answers to questions about a story.

``python tools/tiny_model/measure.py [--model FOLDER]`` prints all of them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text, is_grammatical, questions, split_sentences

# Training draws its stories with seeds far below this one.
HELD_OUT_SEED = 1_000_003


def load_model(
    folder: str | Path = MODEL_FOLDER, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in evaluation mode, and its tokenizer, from ``folder`` (without any network access).

    Raises:
        OSError: ``folder`` holds no model.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def held_out_tokens(
    tokenizer: PreTrainedTokenizerFast, num_windows: int = 32, length: int = 256, seed: int = HELD_OUT_SEED
) -> torch.Tensor:
    """Token ids ``(num_windows, length)`` of stories, each window starting with bos and its stories by blank lines.

    Raises:
        ValueError: the stories drawn are too few for the windows asked for.
    """
    windows = []
    for index in range(num_windows):
        # A story is at least 20 tokens long.
        text = generate_text(length // 20 + 1, seed + index)
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if len(ids) < length:
            raise ValueError(f"window {index} has only {len(ids)} of {length} tokens")
        windows.append(ids[:length])
    return torch.tensor(windows)


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, context: int | None = None, skip: int = 64) -> float:
    """Mean cross entropy in nats of ``tokens`` ``(windows, length)`` from position ``skip`` on.

    With ``context``, each token is predicted from the ``context`` tokens before it and nothing else.

    Raises:
        ValueError: ``skip`` is less than ``context`` or than 1, or not less than the length.
    """
    if not max(1, context or 1) <= skip < tokens.shape[1]:
        raise ValueError(f"skip must lie in [{max(1, context or 1)}, {tokens.shape[1]}), got {skip}")
    targets = tokens[:, skip:]
    if context is None:
        logits = model(tokens).logits[:, skip - 1 : -1]
    else:
        # One row for each target: the tokens [p - context, p) before position p.
        rows = tokens[:, skip - context : -1].unfold(1, context, 1).reshape(-1, context)
        logits = torch.cat([model(part).logits[:, -1] for part in torch.split(rows, 2048)])
    return float(cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1)))


@torch.inference_mode()
def write_stories(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], sample: bool, max_new: int = 120
) -> list[str]:
    """The texts that the model writes after ``prompts``, prompt included; sampled at temperature 1, or greedy."""
    texts = []
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        inputs = torch.tensor([ids])
        kind = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        mask = torch.ones_like(inputs)
        output = model.generate(inputs, attention_mask=mask, max_new_tokens=max_new, **kind)  # type: ignore[operator]
        texts.append(str(tokenizer.decode(output[0], skip_special_tokens=True)))
    return texts


def grammatical_share(texts: Sequence[str]) -> tuple[float, int]:
    """The share of the complete sentences in ``texts`` that are grammatical, and how many sentences there are.

    Raises:
        ValueError: there is no complete sentence.
    """
    # A sentence that the token limit cut off has no final punctuation, and says nothing about the model.
    sentences = [sentence for text in texts for sentence in split_sentences(text) if sentence[-1] in ".?"]
    if not sentences:
        raise ValueError("the texts have no complete sentence")
    return sum(map(is_grammatical, sentences)) / len(sentences), len(sentences)


@torch.inference_mode()
def answer_share(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_questions: int, seed: int) -> float:
    """The share of ``num_questions`` questions about unseen stories whose greedy answer is word for word correct.

    Raises:
        ValueError: ``num_questions`` is less than 1.
    """
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, got {num_questions}")
    right = 0
    for story, answer in questions(num_questions, seed):
        ids = [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]
        expected = tokenizer(f"{story} {answer}", add_special_tokens=False)["input_ids"][len(ids) - 1 :]
        logits = model(torch.tensor([ids + expected])).logits[0, len(ids) - 1 : -1]
        # The greedy answer equals the expected one if and only if each expected token is the best one in its place.
        right += logits.argmax(-1).tolist() == expected
    return right / num_questions


def opening_prompts(num_prompts: int, seed: int) -> list[str]:
    """The first sentences of ``num_prompts`` unseen stories."""
    return [split_sentences(generate_text(1, seed + index))[0] for index in range(num_prompts)]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """All the measurements, by name."""
    torch.manual_seed(0)
    found = {}
    tokens = held_out_tokens(tokenizer)
    for name, context in (("full", None), ("8", 8), ("16", 16), ("32", 32)):
        found[f"perplexity_context_{name}"] = float(torch.tensor(mean_loss(model, tokens, context)).exp())
    longer = held_out_tokens(tokenizer, num_windows=16, length=512)
    found["perplexity_positions_256_to_511"] = float(torch.tensor(mean_loss(model, longer, skip=256)).exp())
    free = write_stories(model, tokenizer, [""] * 100, sample=True)
    found["grammatical_sampled"], found["sentences_sampled"] = grammatical_share(free)
    prompts = opening_prompts(60, HELD_OUT_SEED)
    greedy = write_stories(model, tokenizer, prompts, sample=False)
    # The prompt is grammatical by construction, and must not count.
    own = [text[len(prompt) :] for text, prompt in zip(greedy, prompts, strict=True)]
    found["grammatical_greedy"], found["sentences_greedy"] = grammatical_share(own)
    found["answers_correct"] = answer_share(model, tokenizer, 300, HELD_OUT_SEED)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description="Measure the tiny model.")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="folder of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(*load_model(options.model)), indent=2))


if __name__ == "__main__":
    main()
