"""Converted checkpoints in vLLM: what the entry point `vllm.general_plugins` of this package registers.

vLLM finds the entry point in every process that it starts, so installing xeco-convert beside it is all there is to do. Nothing
of vLLM is imported but what it has already imported itself, and `import xeco_convert` never imports this package.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM's registry the classes of converted models. transformers knows their configurations since this package was
    imported, so no remote code is needed."""
    from vllm import ModelRegistry

    from xeco_convert.vllm.support import architectures

    known = set(ModelRegistry.get_supported_archs())
    for name in architectures():
        if name not in known:
            ModelRegistry.register_model(name, f"xeco_convert.vllm.models:{name}")
