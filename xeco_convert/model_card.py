"""The README.md of a converted checkpoint: what it is, how it was made, how to use it."""

from __future__ import annotations

from typing import Any

from xeco_convert import __version__
from xeco_convert.plan import ConversionPlan
from xeco_convert.report import ConversionReport
from xeco_convert.report_page import step0_rows

_BODY = """
# {title}

Converted from `{source}` ({source_type}) by [xeco-convert](https://pypi.org/project/xeco-convert/) {version}: the attention of
{converted} of {total} layers is multi-head latent attention (MLA) now. Each such layer caches one latent and one rotary key
per token instead of the keys and values of all groups.

| | source | this model |
|---|---|---|
| KV cache, bytes per token | {before} | {after} ({share:.1%}) |
| parameters | {parameters_before:,} | {parameters_after:,} |
{step0}
Initialisation: `{init}`; {ranks}. {advice}

```python
import xeco_convert  # registers the model type; without the package, pass trust_remote_code=True below
from transformers import {model_class}, {input_class}

model = {model_class}.from_pretrained("this folder", dtype="auto")
{inputs} = {input_class}.from_pretrained("this folder")
```

Ranks, errors and sizes of every layer are in `xeco_report.json`; `xeco-convert inspect FOLDER` prints them. Open
[xeco_report.html](xeco_report.html) in a browser for the same with plots.
"""
_TEXT = {"model_class": "AutoModelForCausalLM", "input_class": "AutoTokenizer", "inputs": "tokenizer"}
_IMAGES = {"model_class": "AutoModelForImageTextToText", "input_class": "AutoProcessor", "inputs": "processor"}


def model_card(plan: ConversionPlan, report: ConversionReport) -> str:
    """Text of the card, with the metadata that the Hugging Face hub reads."""
    ranks = sorted({layer.kv_lora_rank for layer in report.layers if layer.kv_lora_rank is not None})
    span = f"kv_lora_rank {ranks[0]}" if len(ranks) == 1 else f"kv_lora_rank {ranks[0]} to {ranks[-1]}"
    bits = sorted({layer.bits for layer in report.layers if layer.bits is not None})
    if bits:
        span += f", cached in {' or '.join(bits)} bits (latent + rotary key)"
    source = plan.source.index.hub_id or plan.source.index.folder.name
    body = _BODY.format(
        title=f"{source.rpartition('/')[2]} with latent attention",
        source=source,
        source_type=plan.source.model_type,
        **(_TEXT if plan.source.wrapper is None else _IMAGES),
        version=__version__,
        converted=len(plan.converted),
        total=len(plan.layers),
        before=report.kv_bytes_before,
        after=report.kv_bytes_after,
        share=report.kv_share,
        parameters_before=report.parameters_before,
        parameters_after=report.parameters_after,
        step0=_step0(report),
        init=report.init,
        ranks=span,
        advice=plan.options.initialisation.advice,
    )
    return _front_matter(plan) + body


def _step0(report: ConversionReport) -> str:
    """Further rows of the table, and what they were measured on; an empty text where step-0 quality is not known."""
    fidelity = report.summary.get("fidelity")
    if not fidelity:
        return ""
    rows = "".join(f"| {' | '.join(row)} |\n" for row in step0_rows(fidelity))
    return (
        f"{rows}\nStep-0 quality: before any training, on {fidelity['num_tokens']:,} tokens of the calibration text "
        "that were not calibrated on.\n"
    )


def _front_matter(plan: ConversionPlan) -> str:
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {"library_name": "transformers", "tags": ["mla", "xeco-convert"]}
    data.update(_inherited(plan))
    if plan.source.index.hub_id is not None:
        data["base_model"] = plan.source.index.hub_id
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n"


def _inherited(plan: ConversionPlan) -> dict[str, Any]:
    """Licence and languages that the source's own card states: they hold for what is made from it."""
    from huggingface_hub import metadata_load

    card = plan.source.index.folder / "README.md"
    try:
        stated = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError:  # a card with broken front matter says nothing that could be passed on
        stated = {}
    return {key: stated[key] for key in ("license", "license_name", "license_link", "language") if key in stated}
