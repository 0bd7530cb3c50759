"""Runs vLLM on several folders in one process: python vllm_worker.py JOBS RESULTS.

JOBS is a JSON list of {"folder", "prompts", "max_tokens", "settings"}; RESULTS gets a list in the same order of {"error"} or
{"requests": [{"ids", "logprobs", "cached"}], "tokens_per_gib"}. Greedy, end of text ignored, five log-probabilities of each step.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

CACHE_GIB = 1
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GIB))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        # vLLM's operators for the CPU write past keys that are not dense, in kept layers too
        "compilation_config": {"custom_ops": ["none"]},
        **({} if "tensor_parallel_size" in job["settings"] else {"distributed_executor_backend": "uni"}),
        **job["settings"],
    }
    engine = LLM(model=job["folder"], **settings)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=5, detokenize=False
    )
    requests = []
    for prompts in job["prompts"]:  # batches, one after the other: a later one may find a prefix in the cache
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        requests += [_result(output) for output in outputs]
    cache = engine.llm_engine.vllm_config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return {"requests": requests, "tokens_per_gib": tokens / CACHE_GIB}


def _result(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    steps = [{str(token): entry.logprob for token, entry in step.items()} for step in first.logprobs]
    return {"ids": list(first.token_ids), "logprobs": steps, "cached": output.num_cached_tokens}


def _clean_up() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), []
    for job in jobs:
        try:
            results.append(run(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        _clean_up()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
