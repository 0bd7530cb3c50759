"""llama.cpp's own converter, told which pre-tokenizer a vocabulary that it does not know has:

    python hf_to_gguf.py LLAMA_CPP FOLDER FILE.gguf

LLAMA_CPP: its sources, with convert_hf_to_gguf.py. It knows tokenizers by a hash; its users add a line to conversion/base.py.
"""

from __future__ import annotations

import runpy
import sys


def main(sources: str, folder: str, file: str) -> None:
    """Write the GGUF file, in float32."""
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def or_gpt2(model: object, tokenizer: object) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = or_gpt2
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "f32"]
    runpy.run_path(f"{sources}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
