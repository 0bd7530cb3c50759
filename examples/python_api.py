"""The Python API, from a pretrained model to text: convert, read the report, load, look into the cache, generate.

    python examples/python_api.py                      # the model that comes with the package; no download, 20 seconds
    python examples/python_api.py MODEL OUT            # your model (folder or hub id), and the folder to write

Needs `pip install .` from a clone of this repository.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert  # also registers the converted model types with transformers
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.evaluate import measure_fidelity, token_windows
from xeco_convert.sweep import sweep

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "model", nargs="?", default=str(MODEL_FOLDER), help="checkpoint folder or hub id [the embedded model]"
)
parser.add_argument("output", nargs="?", help="folder to write [a temporary one]")
parser.add_argument("--text", help="text to calibrate on: .txt, .jsonl, ... [sampled from the model]")
parser.add_argument("--kv-size", default="50%", help="size of the converted KV cache as a share of the source's")
parser.add_argument("--calibration-tokens", type=int, default=4096, help="tokens to calibrate on; convert takes 16384")
parser.add_argument("--prompt", default="Otto was a clever boy, and Ella was his best friend. She had")
arguments = parser.parse_args()
output = arguments.output or str(Path(tempfile.mkdtemp(prefix="xeco-example-")) / "out")

# 1. Ask first what a KV size would cost. `sweep` calibrates and measures at each size and writes no checkpoint. KL is the mean
#    difference of the next-token predictions from the source's, in nats per token: 0 means that nothing changed.
outlook = sweep(
    arguments.model,
    ("50%", "25%"),
    xeco_convert.ConvertOptions(
        kv_size="100%", calibration=arguments.text, calibration_tokens=arguments.calibration_tokens
    ),
)
for point in outlook.points:
    if point.fidelity is None:
        print(f"KV size {point.kv_size}: {point.problem}")
    else:
        print(f"KV size {point.kv_size}: KL {point.fidelity['kl']:.4f}, same top token {point.fidelity['top1']:.1%}")

# 2. Convert. Every option of the command `xeco-convert` is an argument of the same name, with _ for -. Where no text is given
#    (calibration=None), the model samples its own.
report = xeco_convert.convert(
    arguments.model,
    output,
    kv_size=arguments.kv_size,
    calibration=arguments.text,
    calibration_tokens=arguments.calibration_tokens,
)

# 3. The report is data: one entry for each layer, and totals. The same is in OUT/xeco_report.json and OUT/xeco_report.html.
print(f"\nwritten: {output} ({report.model_type}, {report.dtype})")
for layer in report.layers:
    if layer.kv_lora_rank is not None:  # None: this layer keeps its own attention
        print(
            f"layer {layer.layer}: latent {layer.kv_lora_rank} + rotary key {layer.qk_rope_head_dim} numbers per token"
        )
print(f"KV cache: {report.kv_bytes_before} -> {report.kv_bytes_after} bytes per token ({report.kv_share:.1%})")

# 4. Load it like any other model. `import xeco_convert` at the top is all that is needed; on a machine without the package, pass
#    trust_remote_code=True in its place, which runs the code files in OUT.
tokenizer = AutoTokenizer.from_pretrained(output)
model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")

# 5. Generate. The cache is the stock one of transformers. A converted layer stores the latent where keys are stored otherwise,
#    and the shared rotary key where values are: one "head" each, whatever the number of attention heads.
inputs = tokenizer(arguments.prompt, return_tensors="pt")
result = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
text = tokenizer.decode(result.sequences[0], skip_special_tokens=True)
print(f"\n{text}")
for number, cached in enumerate(result.past_key_values.layers):
    print(f"layer {number} caches {tuple(cached.keys.shape)} and {tuple(cached.values.shape)}")

# 6. Compare with the source on text of your own: perplexity of both, KL, and how often the most likely token is the same.
#    Windows are [number, tokens]. Here the text is what the model has just written; take real text for real figures.
source = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
windows = token_windows(text, tokenizer, length=16)
fidelity = measure_fidelity(source, model, windows)
print(
    f"\nperplexity {fidelity.perplexity_source:.3f} -> {fidelity.perplexity:.3f}, KL {fidelity.kl:.4f} nats per token"
)
