"""vLLM on the CPU: tokens per second and cached tokens per GiB, a converted folder by the plugin beside its source.

    build/vllm-0.32.0/bin/python benchmarks/bench_vllm.py --source IN --converted OUT [--json benchmarks/results/vllm.json]

Runs in an environment with vLLM (scripts/engines.sh makes one). The source goes through vLLM's own CPU backend. Each folder is
served in a process of its own, in turns, `--rounds` times each: prompts of random tokens of each length, all requests at once,
first as a prefill, then again for `--new-tokens` greedy tokens with the prompts taken from the prefix cache, so that the time is
that of decoding. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import describe, format_table, machine_facts, write_json

CONTEXTS = (512, 1024, 2048, 4096, 8064)  # the last leaves room for new tokens below 8192
MARGIN = 64  # positions beside the longest prompt and the new tokens
COLUMNS = ["context", "folder", "decode, tokens/s", "of the source", "prefill, tokens/s", "of the source"]


def serve(settings: dict[str, Any]) -> dict[str, Any]:
    """Run vLLM on one folder: {"tokens_per_gib", "contexts": {length: {"prefill", "decode"}}}, tokens per second."""
    import torch
    from vllm import LLM, SamplingParams

    contexts, new_tokens = settings["contexts"], settings["new_tokens"]
    engine = LLM(
        model=settings["folder"],
        dtype=settings["dtype"],
        max_model_len=max(contexts) + new_tokens + MARGIN,
        max_num_seqs=settings["batch"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        distributed_executor_backend="uni",
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    measured = {}
    for length in contexts:
        ids = torch.randint(
            10, vocabulary, (settings["batch"], length), generator=torch.Generator().manual_seed(length)
        )
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        seconds = []
        for count in (1, new_tokens + 1):
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        if (
            min(output.num_cached_tokens or 0 for output in outputs)
            < length - 2 * engine.llm_engine.vllm_config.cache_config.block_size
        ):
            raise RuntimeError(
                f"{settings['folder']}: prompts of {length} tokens were not in the prefix cache the second time"
            )
        measured[length] = {
            "prefill": settings["batch"] * length / seconds[0],
            "decode": settings["batch"] * new_tokens / seconds[1],
        }
    cache = engine.llm_engine.vllm_config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return {"tokens_per_gib": tokens / settings["cache_gib"], "contexts": measured}


def in_process(settings: dict[str, Any]) -> dict[str, Any]:
    """`serve` in a process of its own, whose memory is free afterwards."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(settings["cache_gib"]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--serve", json.dumps(settings), "--json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        if done.returncode:
            raise RuntimeError(f"vLLM ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        return dict(json.loads(result.read_text()))


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median figure of each length, and the size of the cache, which does not vary."""
    lengths = rounds[0]["contexts"]
    return {
        "tokens_per_gib": rounds[0]["tokens_per_gib"],
        "contexts": {
            length: {
                kind: statistics.median(each["contexts"][length][kind] for each in rounds)
                for kind in ("prefill", "decode")
            }
            for length in lengths
        },
    }


def rows(source: dict[str, Any], converted: dict[str, Any]) -> Iterator[list[Any]]:
    """A line for each length and folder."""
    for length, before in source["contexts"].items():
        after = converted["contexts"][length]
        yield [length, "source", before["decode"], None, before["prefill"], None]
        ratios = [after[kind] / before[kind] for kind in ("decode", "prefill")]
        yield ["", "converted", after["decode"], ratios[0], after["prefill"], ratios[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--converted", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--batch", type=int, default=4, help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-gib", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write JSON here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        write_json(arguments.json, serve(json.loads(arguments.serve)))
        return
    if arguments.source is None or arguments.converted is None:
        parser.error("--source and --converted: expected two folders")
    machine = machine_facts()
    settings = {name: vars(arguments)[name] for name in ("contexts", "batch", "new_tokens", "dtype", "cache_gib")}
    folders = {"source": arguments.source, "converted": arguments.converted}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for _ in range(arguments.rounds):
        for name, folder in folders.items():
            rounds[name].append(in_process({**settings, "folder": str(folder)}))
    results = {name: medians(each) for name, each in rounds.items()}
    print(describe(machine))
    print(format_table(COLUMNS, list(rows(results["source"], results["converted"]))))
    per_gib = {name: result["tokens_per_gib"] for name, result in results.items()}
    print(
        f"cached tokens per GiB: {per_gib['source']:,.0f} source, {per_gib['converted']:,.0f} converted "
        f"({per_gib['converted'] / per_gib['source']:.2f} times)"
    )
    write_json(arguments.json, {"machine": machine, "settings": settings, **results})


if __name__ == "__main__":
    main()
