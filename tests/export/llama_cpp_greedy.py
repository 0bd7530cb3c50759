"""Greedy tokens of a GGUF file by llama.cpp, in an interpreter that has xllamacpp:

    python llama_cpp_greedy.py FILE.gguf PROMPTS.json TOKENS RESULT.json

PROMPTS: lists of token ids. RESULT: for each prompt the tokens that follow and, for each of these, the log-probabilities of the
five likeliest by token. float32 for everything that is cached; what ends a text is left out, so that every prompt gives as many.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp


def main(file: str, prompts: str, num_tokens: str, result: str) -> None:
    """Write the result."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = 0  # GGML_TYPE_F32
    server = xllamacpp.Server(params)
    answers = []
    for ids in json.loads(Path(prompts).read_text()):
        request = {"prompt": ids, "max_tokens": int(num_tokens), "temperature": 0, "logprobs": 5, "ignore_eos": True}
        steps = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        tops = [{str(top["id"]): top["logprob"] for top in step["top_logprobs"]} for step in steps]
        answers.append({"ids": [step["id"] for step in steps], "logprobs": tops})
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
