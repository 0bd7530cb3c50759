"""Tiny random models of text and images around the families, as files in both layouts of names, and inputs with an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import randomise, source_config, stored_tensors, write_json, write_tokenizer, write_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE_TOKEN = 90
_SIZE, _PATCH = 16, 8  # of images and patches: 2 × 2 patches
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIZE,
    "patch_size": _PATCH,
    "num_channels": 3,
}
_TOKENS = {"image_token_index": IMAGE_TOKEN}
_LLAVA = {**_TOKENS, "image_seq_length": 4, "vision_feature_layer": -1}
_LLAVA_NEXT = {**_LLAVA, "image_grid_pinpoints": [[_SIZE, _SIZE]]}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 24, **_VISION}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION}
_PIXTRAL = {"model_type": "pixtral", "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}

# model_type -> the text model (a variant of builders), the vision model, and other fields of the whole.
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", _SIGLIP, {**_TOKENS, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {**_PIXTRAL, **_VISION}, {**_TOKENS, "spatial_merge_size": 1, "vision_feature_layer": -1}),
    "llava": ("llama", _CLIP, _LLAVA),
    "llava_next": ("llama", _CLIP, _LLAVA_NEXT),
    "llava_onevision": ("qwen2", _SIGLIP, {**_LLAVA_NEXT, "vision_aspect_ratio": "anyres_max_9"}),
    "internvl": (
        "qwen3",
        {"model_type": "internvl_vision", **_VISION, "image_size": [_SIZE] * 2, "patch_size": [_PATCH] * 2},
        {"image_token_id": IMAGE_TOKEN, "image_seq_length": 1, "downsample_ratio": 0.5, "vision_feature_layer": -1},
    ),
    "idefics3": (
        "llama",
        {"model_type": "idefics3_vision", **_VISION},
        {"image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": 0},
    ),
    "smolvlm": (
        "llama_tied",
        {"model_type": "smolvlm_vision", **_VISION},
        {"image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": 0},
    ),
}


def wrapped_config(model_type: str, text: str | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; `text`: another text model, `changes`: fields of its configuration."""
    variant, vision, fields = WRAPPED[model_type]
    inner = source_config(text or variant, **changes)
    return {
        "model_type": model_type,
        "text_config": inner,
        "vision_config": dict(vision),
        **fields,
        "tie_word_embeddings": inner["tie_word_embeddings"],
        "dtype": "float32",
    }


def wrapped_model(model_type: str, text: str | None = None, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model in float32 with random weights, biases and norms."""
    config = AutoConfig.for_model(**wrapped_config(model_type, text, **changes))
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, seed)
    return model


def build_wrapped(
    folder: Path,
    model_type: str,
    text: str | None = None,
    *,
    layout: str = "published",
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    **changes: Any,
) -> Path:
    """Write such a checkpoint, with a tokenizer. `layout`: names of the tensors as transformers saves them ("published"), as
    in the "class", or as transformers 4 saved them ("old")."""
    model = wrapped_model(model_type, text, **changes)
    config = wrapped_config(model_type, text, **changes)
    config |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_weights(folder, wrapped_tensors(model, layout, dtype), num_shards)
    write_tokenizer(folder)
    return folder


def wrapped_tensors(model: PreTrainedModel, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict as a checkpoint holds it."""
    if layout != "class":
        tensors = stored_tensors(model, dtype)
        return tensors if layout == "published" else _old_names(model, tensors)
    state = {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def _old_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the module that CLIP and SigLIP had between the encoder and its parts, and the position_ids that CLIP stored."""
    kind = model.config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        return tensors
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    if kind == "clip_vision_model":
        old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return old


def image_inputs(model_type: str, *, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Text around one image in each row, as the model's processor would give it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, IMAGE_TOKEN, (rows, 14), generator=generator)
    pixels = torch.randn(rows, 3, _SIZE, _SIZE, generator=generator)
    count = {"llava_next": 10, "llava_onevision": 10, "internvl": 1, "idefics3": 1, "smolvlm": 1}.get(model_type, 4)
    image = torch.full((rows, count), IMAGE_TOKEN)
    ids = torch.cat([text[:, :5], image, text[:, 5:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    sizes = torch.full((rows, 2), _SIZE)
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    elif model_type == "mistral3":
        inputs["image_sizes"] = sizes
    elif model_type in ("llava_next", "llava_onevision"):
        inputs |= {"image_sizes": sizes, "pixel_values": torch.stack([pixels, pixels], dim=1)}
    elif model_type in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = pixels.unsqueeze(1)
    return inputs
