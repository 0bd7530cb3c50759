"""What transformers makes of a checkpoint's files: its configuration and its model. What it refuses is one sentence here.

The one place that calls transformers' loaders for configurations and models that write text, so that a source means the same
to the plan, to calibration, to export and to healing, and so that no traceback of theirs reaches a user.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from xeco_convert.checkpoint.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex, read_json
from xeco_convert.errors import CheckpointError, reason_of, shown

_MOST = 100_000  # of anything that config.json counts


def read_config(raw: Mapping[str, Any], where: str | Path = "config.json") -> Any:
    """transformers' configuration object of the contents of a config.json; `where` names the file in errors.

    Raises `CheckpointError` where transformers does not take it. An empty quantization_config, which dequantising tools
    leave behind, counts as none.
    """
    import transformers
    from transformers import AutoConfig

    _check_counts(raw, where)
    with TemporaryDirectory(prefix="xeco-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(without_empty_settings(raw)), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # validators and constructors of many classes: they raise what they like
            raise CheckpointError(
                f"{where}: transformers {transformers.__version__} does not take these settings ({reason_of(error)}); take "
                "config.json from the model's own folder, or correct the field."
            ) from None


def _check_counts(raw: Mapping[str, Any], where: str | Path) -> None:
    """Refuse absurd counts, in the settings of every part: transformers' classes make something for each label, each layer."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            _check_counts(value, where)
        elif isinstance(value, int) and value > _MOST and str(name).startswith("num_"):
            raise CheckpointError(
                f"{where}: expected {name} to be at most {_MOST}, found {shown(value)}; take config.json from the model's own "
                "folder."
            )


def resolved(index: CheckpointIndex) -> CheckpointIndex:
    """A checkpoint whose `config` has, beside what config.json says, all fields as transformers resolves them: silent ones with
    the defaults of the class, old spellings under their present names. Raises `CheckpointError` as `read_config` does."""
    values = read_config(index.config, index.folder / "config.json").to_dict()
    values.pop("_name_or_path", None)  # where it was read
    return replace(index, config={**index.config, **values})


def without_empty_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the settings that say nothing: a quantization_config that is null or empty."""
    return {name: value for name, value in raw.items() if name != "quantization_config" or value not in (None, {})}


def auto_class(config: Any) -> Any:
    """transformers' Auto class for a configuration: AutoModelForCausalLM, or that of models around a text model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def load_causal_lm(folder: Path, dtype: Any, **options: Any) -> Any:
    """A model of transformers that writes text, from a local folder, on the CPU, without its progress bars.

    `dtype`: a torch dtype or "auto"; `options` go to from_pretrained. Scores that are capped are computed by the eager
    attention, the only one that caps them in every release. Raises `CheckpointError` in one sentence: where the model cannot be
    loaded, and where weights are missing, which transformers makes up.
    """
    import xeco_convert  # noqa: F401  registers the converted families

    config = plain_outputs(read_config(read_json(folder / "config.json"), folder / "config.json"))
    if getattr(config, "attn_logit_softcapping", None):
        options = {"attn_implementation": "eager", **options}
    try:
        with _no_progress_bars(), _loadable(folder) as whole:
            model, loading_info = auto_class(config).from_pretrained(
                whole,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # of transformers, safetensors, torch
        raise CheckpointError(f"{folder}: the model could not be loaded ({reason_of(error)}).") from None
    if loading_info["missing_keys"]:
        raise CheckpointError(
            f"{folder}: the weights hold no {min(loading_info['missing_keys'])}, which the model needs; download or convert it "
            "again."
        )
    return model


def plain_outputs(config: Any) -> Any:
    """The configuration, in place, for calls that read logits or hidden states off what the model returns."""
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return config


@contextmanager
def _loadable(folder: Path) -> Iterator[Path]:
    """The folder, or links to its files with a whole index where the index leaves out its metadata, which transformers reads."""
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        yield folder
        return
    index = read_json(folder / INDEX_FILE)
    if isinstance(index.get("metadata"), dict):
        yield folder
        return
    with TemporaryDirectory(prefix="xeco-index-") as linked:
        for file in folder.iterdir():
            if file.name != INDEX_FILE:
                (Path(linked) / file.name).symlink_to(file)
        (Path(linked) / INDEX_FILE).write_text(json.dumps({**index, "metadata": {}}), encoding="utf-8")
        yield Path(linked)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers' own bars would run into the command's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
