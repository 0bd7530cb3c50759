"""Run by bench_export.py and by a test in a Python that does not have this package: an export in transformers' own class.

    python -I -S benchmarks/stock_without_package.py SITE_PACKAGES FOLDER IDS OUTPUT NEW_TOKENS

SITE_PACKAGES: folders, separated as in PATH. -S leaves out their .pth files, by which a package installed in editable mode is
found. Writes logits [B, T, V],
greedy tokens [NEW_TOKENS] behind the first 16 of the first row, and the bytes of the cache with the tokens in it.
"""

import importlib.util
import os
import sys

sys.path.extend(sys.argv[1].split(os.pathsep))
if importlib.util.find_spec("xeco_convert") is not None:
    sys.exit("xeco_convert can be imported here; install it in editable mode, or give another folder of packages")

import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

folder, ids, new_tokens = sys.argv[2], torch.load(sys.argv[3]), int(sys.argv[5])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert type(model) is DeepseekV3ForCausalLM, type(model)
prompt = ids[:1, :16]
with torch.no_grad():
    logits = model(ids).logits
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
layers = output.past_key_values.layers
torch.save(
    {
        "logits": logits,
        "greedy": output.sequences[0, prompt.shape[1] :],
        "cache_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        "cache_tokens": layers[0].keys.shape[-2],
    },
    sys.argv[4],
)
