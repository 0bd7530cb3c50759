"""xeco-convert: turn pretrained attention into multi-head latent attention (MLA), so that the KV cache gets small.

`import xeco_convert` registers the converted model types with transformers' Auto classes. `xeco_convert.convert` does what
the command `xeco-convert` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xeco_convert.registration import register_families

if TYPE_CHECKING:
    from xeco_convert.conversion import convert as convert
    from xeco_convert.options import ConvertOptions as ConvertOptions

__version__ = "0.1.0"
__all__ = ["ConvertOptions", "__version__", "convert"]

register_families()


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch takes seconds to import, and `xeco-convert --help` must not.
    if name == "convert":
        from xeco_convert.conversion import convert

        return convert
    if name == "ConvertOptions":
        from xeco_convert.options import ConvertOptions

        return ConvertOptions
    raise AttributeError(f"module {__name__} has no attribute {name}")
