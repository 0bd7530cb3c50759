"""Which families vLLM serves, by which of its classes; what it refuses, in words. Data and rules, nothing of vLLM imported.

A converted model is vLLM's own class of the source family whose attention is exchanged, so a family is one line of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xeco_convert.errors import UnsupportedModelError
from xeco_convert.families import WRAPPERS, supported_model_types
from xeco_convert.modeling.configuration_xeco import MULTIMODAL
from xeco_convert.modeling.layer_xeco import MlaLayer

KNOWN_VERSIONS = ("0.32",)
# The decode kernel of Triton multiplies tiles of at least 16 numbers, and pads widths to powers of two.
_LEAST_TILE = 9
# It takes these numbers per token for DeepSeek's 512 + 64 and 256 + 32, and cuts its tiles for that.
_FIXED_TILES: Mapping[int, int] = {576: 512, 288: 256}
_WIDEST_PREFILL_HEAD = 256  # of FlashAttention


@dataclass(frozen=True)
class VllmFamily:
    """One family: the module below vllm.model_executor.models and the class that runs it, or why there is none."""

    module: str = ""
    class_name: str = ""
    refusal: str = ""


def _no_decoder(name: str) -> VllmFamily:
    return VllmFamily(
        refusal=f"vLLM has no decoder of its own for {name} (its transformers backend runs the source), so there is none whose "
        "attention could be exchanged"
    )


FAMILIES: Mapping[str, VllmFamily] = {
    "gemma2": VllmFamily("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": VllmFamily("gemma3", "Gemma3ForCausalLM"),
    "gpt_neox": _no_decoder("GPT-NeoX"),
    "granite": VllmFamily("granite", "GraniteForCausalLM"),
    "llama": VllmFamily("llama", "LlamaForCausalLM"),
    "mistral": VllmFamily("mistral", "MistralForCausalLM"),
    "mixtral": VllmFamily("mixtral", "MixtralForCausalLM"),
    "olmo2": _no_decoder("OLMo 2"),
    "phi3": VllmFamily("phi3", "Phi3ForCausalLM"),
    "qwen2": VllmFamily("qwen2", "Qwen2ForCausalLM"),
    "qwen3": VllmFamily("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": VllmFamily("qwen3_moe", "Qwen3MoeForCausalLM"),
    # SmolLM3 is Llama but for the layers without rotation, which the converted attention knows, and models.py tells kept ones
    "smollm3": VllmFamily("llama", "LlamaForCausalLM"),
}
_MULTIMODAL_REFUSAL = "models of text and images are not served yet; serve the converted folder with transformers"


def architectures() -> dict[str, tuple[str, VllmFamily]]:
    """Class name in config.json -> how the source's classes begin and the family, for every converted model that there can be:
    the refused ones too, whose sentence is better than what vLLM says of a name that it does not know."""
    families = {
        f"Xeco{spec.class_prefix}ForCausalLM": (spec.class_prefix, FAMILIES[model_type])
        for model_type, spec in supported_model_types().items()
    }
    wrappers = {
        f"Xeco{prefix}{MULTIMODAL}ForConditionalGeneration": (prefix, VllmFamily(refusal=_MULTIMODAL_REFUSAL))
        for prefix in WRAPPERS.values()
    }
    return {**families, **wrappers}


def check_version(version: str) -> None:
    """Raises `UnsupportedModelError` for a vLLM that is not known to work."""
    if ".".join(version.split(".")[:2]) not in KNOWN_VERSIONS:
        raise UnsupportedModelError(
            f"vLLM {version}: expected {' or '.join(KNOWN_VERSIONS)}, with which converted models are tested; install that, or "
            "set XECO_VLLM_ANY_VERSION=1 to try."
        )


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """What vLLM was started with, as far as a layer depends on it. `device`: "cpu", or "gpu" for CUDA and ROCm; `max_model_len`
    in tokens; `cache_dtype` as --kv-cache-dtype says."""

    device: str
    max_model_len: int
    cache_dtype: str = "auto"


def check_layer(number: int, layer: MlaLayer, window: int | None, settings: ServingSettings) -> None:
    """Raises `UnsupportedModelError` where the attention of this device cannot compute a layer; `window`: tokens that a query
    sees, None for all."""
    obstacle = _obstacle(layer, window, settings)
    if obstacle is not None:
        raise UnsupportedModelError(f"layer {number}: {obstacle}.")


def _obstacle(layer: MlaLayer, window: int | None, settings: ServingSettings) -> str | None:
    if layer.is_packed:
        return (
            f"latents and rotary keys in {layer.bits_in_words} bits are read by transformers alone; vLLM's "
            "pages hold numbers: serve with transformers, or convert without --cache-bits"
        )
    if layer.logit_softcap is not None and "kv_b" in layer.biases:
        return "scores are capped and keys have a bias, which latent attention cannot leave out then; serve with transformers"
    if settings.device == "cpu":
        if settings.cache_dtype not in ("auto", "float32", "bfloat16", "float16"):
            return f"the CPU caches latents in the model's dtype, found --kv-cache-dtype {settings.cache_dtype}; leave it out"
        return None
    if layer.logit_softcap is not None:
        return "its scores are soft-capped, which vLLM's MLA attention on GPUs does not do; serve it with transformers"
    if window is not None and window < settings.max_model_len:
        return (
            f"it attends through a window of {window} tokens, which vLLM's MLA attention on GPUs does not do; start with "
            f"--max-model-len {window}, or convert with --layers without this layer"
        )
    return _width_obstacle(layer)


def _width_obstacle(layer: MlaLayer) -> str | None:
    """Of vLLM's Triton decode kernel and of FlashAttention in prefill."""
    if max(layer.qk_head_dim, layer.v_head_dim) > _WIDEST_PREFILL_HEAD:
        return (
            f"FlashAttention takes heads of at most {_WIDEST_PREFILL_HEAD} numbers, found {layer.qk_head_dim} for queries and "
            f"{layer.v_head_dim} for values; convert with a smaller --rope-dim"
        )
    return kernel_obstacle(layer)


def kernel_obstacle(layer: MlaLayer) -> str | None:
    """Why the Triton decode kernel cannot compute a layer of these widths, None where it can."""
    if layer.kv_lora_rank < _LEAST_TILE or 0 < layer.qk_rope_head_dim < _LEAST_TILE:
        return (
            f"the Triton kernel takes kv_lora_rank of {_LEAST_TILE} and more and qk_rope_head_dim of 0 or {_LEAST_TILE + 1} and "
            f"more, found {layer.kv_lora_rank} and {layer.qk_rope_head_dim}; convert with --rank and --rope-dim"
        )
    tile = _FIXED_TILES.get(layer.cache_width)
    if tile is not None and not tile // 2 < layer.kv_lora_rank <= tile:
        return (
            f"the Triton kernel takes {layer.cache_width} cached numbers for a latent of {tile // 2 + 1} to {tile}, found "
            f"{layer.kv_lora_rank} and a rotary key of {layer.qk_rope_head_dim}; convert with another --rank"
        )
    return None
