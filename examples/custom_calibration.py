"""Calibrate on your own text, and see what that is worth beside text that the model samples itself.

    python examples/custom_calibration.py                        # the embedded model and text of its language; no download
    python examples/custom_calibration.py MODEL --text my.txt    # your model, your text

The factors of a converted layer are made from the activations of the model on some text, so the text says what they are good
at. Without a text the model samples its own, which needs the whole source in memory. With a text, one layer at a time is
enough. The command line has the same as `xeco-convert IN OUT --kv-size 25% --calibration my.txt`.

Needs `pip install .` from a clone of this repository.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import xeco_convert
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.demo.language import generate_text
from xeco_convert.evaluate import measure_fidelity, token_windows

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "model", nargs="?", default=str(MODEL_FOLDER), help="checkpoint folder or hub id [the embedded model]"
)
parser.add_argument(
    "--text", type=Path, help="a .txt file, of which the last tenth measures [text of the demo's language]"
)
parser.add_argument("--kv-size", default="25%", help="size of the converted KV cache as a share of the source's")
parser.add_argument("--tokens", type=int, default=16384, help="tokens to calibrate on")
parser.add_argument("--windows", type=int, default=16, help="windows of 128 tokens to measure on, at most")
arguments = parser.parse_args()
work = Path(tempfile.mkdtemp(prefix="xeco-example-"))

# 1. Divide the text. What calibrates must not measure: the first nine tenths calibrate, the rest is only read in step 3.
#    A .txt file is one running text. Other formats that --calibration takes have one document for each record: .jsonl with
#    "text" or chat "messages", .json (also token ids), .csv, .parquet, or the name of a data set.
text = arguments.text.read_text(encoding="utf-8") if arguments.text else generate_text(num_stories=600, seed=7)
cut = len(text) * 9 // 10
calibration, held_out = work / "calibration.txt", text[cut:]
calibration.write_text(text[:cut], encoding="utf-8")

# 2. Convert twice at the same KV size: once with the text, once with the model's own samples.
outputs = {"your text": work / "from-text", "the model's samples": work / "from-samples"}
for name, output in outputs.items():
    report = xeco_convert.convert(
        arguments.model,
        output,
        kv_size=arguments.kv_size,
        calibration=str(calibration) if name == "your text" else None,
        calibration_tokens=arguments.tokens,
    )
    print(f"calibrated on {name}: {report.kv_share:.1%} of the KV cache, {report.seconds:.0f} s")

# 3. Compare both with the source on the held-out part. KL is the figure to decide by: how far the predictions of the next token
#    are from the source's, in nats per token.
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
source = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
windows = token_windows(held_out, tokenizer, length=128)[: arguments.windows]
print(f"\nmeasured on {windows.numel()} held-out tokens:")
for name, output in outputs.items():
    converted = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    fidelity = measure_fidelity(source, converted, windows)
    print(
        f"calibrated on {name}: perplexity {fidelity.perplexity_source:.3f} -> {fidelity.perplexity:.3f}, "
        f"KL {fidelity.kl:.4f}, same top token {fidelity.top1:.1%}"
    )

# 4. Keep the better folder; both are whole checkpoints. With little text (below some 10,000 tokens) the model's own samples are
#    often the better text, with more of it real text is; and text of the domain that you serve is worth most there.
print(f"\nthe checkpoints are in {work}")
