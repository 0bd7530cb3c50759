"""From a pretrained model to one that an engine serves: convert, heal, evaluate, generate, export.

    python examples/convert_heal_serve.py                   # the model that comes with the package; no download, about a minute
    python examples/convert_heal_serve.py MODEL WORK        # your model (folder or hub id), and a folder for what is written

Each step names the command that does the same. Needs `pip install '.[distill]'` from a clone of this repository. The settings
are small, so that the example ends soon; the comments say what to take for a real model.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.export import ExportOptions, export_checkpoint
from xeco_distill.evaluation.checkpoint import EvalOptions, evaluate_checkpoint
from xeco_distill.pipeline import heal

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "model", nargs="?", default=str(MODEL_FOLDER), help="checkpoint folder or hub id [the embedded model]"
)
parser.add_argument("work", nargs="?", help="folder for what is written [a temporary one]")
parser.add_argument("--text", help="text to calibrate, heal and measure on: .txt, .jsonl, ... [sampled from the model]")
parser.add_argument("--kv-size", default="50%", help="size of the converted KV cache as a share of the source's")
parser.add_argument("--calibration-tokens", type=int, default=8192, help="tokens to calibrate on")
parser.add_argument(
    "--heal-tokens", type=int, default=16384, help="tokens to heal on; 1000000 is the default of xeco-distill"
)
parser.add_argument("--layer-steps", type=int, default=50, help="steps of each layer before that; 300 is the default")
parser.add_argument("--eval-tokens", type=int, default=8192, help="tokens to measure on; 32768 is the default")
parser.add_argument("--prompt", default="Otto was a clever boy, and Ella was his best friend. She had")
arguments = parser.parse_args()
work = Path(arguments.work or tempfile.mkdtemp(prefix="xeco-example-"))
converted, exported = work / "converted", work / "exported"

# 1. Convert:  xeco-convert MODEL WORK/converted --kv-size 50% --portable
#    portable: only what a stock DeepSeek-V3 model can hold, so that step 5 loses nothing. It costs quality, so leave it out where
#    transformers serves the model: transformers loads the converted folder itself.
report = xeco_convert.convert(
    arguments.model,
    converted,
    kv_size=arguments.kv_size,
    portable=True,
    calibration=arguments.text,
    calibration_tokens=arguments.calibration_tokens,
)
print(
    f"1. converted: KV cache {report.kv_bytes_before} -> {report.kv_bytes_after} bytes per token ({report.kv_share:.1%})"
)

# 2. Heal:  xeco-distill WORK/converted
#    Healing trains the converted model on its source's predictions. Where no text is given (data=None), the source samples it.
#    Some of the text is held out, to measure on. First each layer is fitted to the source's layer, then the whole model learns by
#    KL divergence. The folder is replaced only by a whole, measured checkpoint; the weights before are kept in
#    WORK/converted.before-healing.
healing = heal(
    converted,
    data=arguments.text,
    budget_tokens=arguments.heal_tokens,
    layer_tokens=arguments.heal_tokens,
    layer_steps=arguments.layer_steps,
    seq_length=128,
    held_out_tokens=4096,
)
print(
    f"2. healed on {healing.tokens} tokens: KL {healing.before['kl']:.4f} -> {healing.after['kl']:.4f} nats per token"
)

# 3. Evaluate:  xeco-distill eval WORK/converted
#    Perplexity, KL from the source, and how often the most likely token is the same. For figures to publish, take text that was
#    not trained on. tasks="arc_easy,hellaswag" adds tasks of lm-eval, needle=True retrieval from long contexts.
measured = evaluate_checkpoint(
    converted, EvalOptions(data=arguments.text, tokens=arguments.eval_tokens, seq_length=128)
)["quality"]
print(
    f"3. perplexity {measured['perplexity_source']:.3f} -> {measured['perplexity']:.3f}, same top token {measured['top1']:.1%}"
)

# 4. Generate, as with any model of transformers.
tokenizer = AutoTokenizer.from_pretrained(converted)
model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
inputs = tokenizer(arguments.prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(f"4. {tokenizer.decode(tokens[0], skip_special_tokens=True)}")

# 5. Export:  xeco-convert export WORK/converted WORK/exported
#    A stock DeepSeek-V3 checkpoint without code files. Before it is put in place, transformers' own class loads it, and logits
#    and greedy text are compared with the converted model; a mismatch is an error. target="vllm", "sglang" and "llama.cpp" give
#    the widths and settings that these engines take (docs/serving.md has what each of them takes, and what was run).
export = export_checkpoint(converted, exported, ExportOptions(target="transformers"))
print(f"5. exported: latent {export.kv_lora_rank} + rotary key {export.qk_rope_head_dim} numbers per token and layer")

# 6. Serve it. One of these, outside this script:
print(f"""6. to serve it:
   transformers serve {exported} --host 127.0.0.1 --port 8000
   xeco-convert export {converted} {work / "for-vllm"} --target vllm && vllm serve {work / "for-vllm"}""")
