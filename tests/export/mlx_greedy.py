"""mlx_greedy.py FOLDER IDS.json TOKENS OUT.json: logits and greedy tokens of mlx-lm for every row of IDS.

For an environment that has mlx-lm and neither torch nor this package. Logits are those of a row's own tokens; TOKENS new ones
follow it, one at a time.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def greedy(model, row, count):
    """Logits [T, vocabulary] of the row, the new tokens, and the numbers that one layer has cached for each token."""
    cache = make_prompt_cache(model)
    output = model(mx.array([row]), cache=cache)
    logits, tokens = output[0].astype(mx.float32).tolist(), []
    while True:
        tokens.append(int(mx.argmax(output[0, -1])))
        if len(tokens) == count:
            break
        output = model(mx.array([tokens[-1:]]), cache=cache)
    keys, values = cache[0].keys, cache[0].values
    return logits, tokens, keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]


def main(folder, ids, count, result):
    model, _ = load_model(Path(folder))
    rows = [greedy(model, row, int(count)) for row in json.loads(Path(ids).read_text())]
    logits, tokens, cached = zip(*rows, strict=True)
    Path(result).write_text(json.dumps({"logits": logits, "tokens": tokens, "cached": cached[0]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
