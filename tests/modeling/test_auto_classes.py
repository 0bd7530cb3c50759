"""transformers' Auto classes know the converted families, whatever was imported first; each order in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import run_fresh

from xeco_convert.families import WRAPPERS, supported_model_types

LOAD = (
    "from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(out); assert 'Xeco' in type(m).__name__"
)
CONFIG = "from transformers import AutoConfig; assert AutoConfig.from_pretrained(out).model_type == 'xeco_llama'"
TOKENIZER = (
    "from transformers import AutoTokenizer; assert AutoTokenizer.from_pretrained(out)('w5 w9').input_ids == [5, 9]"
)
ORDERS = {
    "a model class of a family": ("import xeco_convert", "from transformers import LlamaForCausalLM", LOAD),
    "a model class of another kind": ("import xeco_convert", "from transformers import BertModel", LOAD),
    "several model classes": (
        "import xeco_convert",
        "from transformers import LlamaModel, Gemma2ForCausalLM, GPTNeoXForCausalLM, T5Model",
        LOAD,
    ),
    "a configuration class of a family": ("import xeco_convert", "from transformers import Qwen3Config", CONFIG, LOAD),
    "AutoConfig of the source": (
        "import xeco_convert",
        "from transformers import AutoConfig; AutoConfig.from_pretrained(source)",
        LOAD,
    ),
    "AutoConfig alone": ("import xeco_convert", CONFIG),
    "AutoTokenizer alone, then a model": ("import xeco_convert", TOKENIZER, LOAD),
    "transformers after": ("import xeco_convert", "import transformers", LOAD, TOKENIZER, CONFIG),
    "transformers before": ("import transformers", "import xeco_convert", CONFIG, LOAD, TOKENIZER),
    "a configuration class before": ("from transformers import LlamaConfig", "import xeco_convert", CONFIG, LOAD),
    "AutoConfig before": ("from transformers import AutoConfig", "import xeco_convert", CONFIG, TOKENIZER, LOAD),
    "AutoTokenizer before": ("from transformers import AutoTokenizer", "import xeco_convert", TOKENIZER, LOAD),
    "a model class before": ("from transformers import BertModel", "import xeco_convert", LOAD, TOKENIZER),
    "a source loaded before": (
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(source)",
        "import xeco_convert",
        LOAD,
    ),
    "healing": ("import xeco_distill.cli", "from transformers import LlamaForCausalLM", LOAD),
    "the classes themselves": (
        "from xeco_convert.modeling.modeling_xeco import XecoLlamaForCausalLM",
        "from transformers import LlamaForCausalLM",
        "assert issubclass(XecoLlamaForCausalLM, LlamaForCausalLM)",
        LOAD,
    ),
}
EVERY_FAMILY = """
import sys
import xeco_convert
assert "transformers" not in sys.modules, "an import of the package alone starts transformers"
from transformers import AutoConfig
from transformers.models.auto import modeling_auto, tokenization_auto
assert not any(name.startswith("xeco_convert.modeling") for name in sys.modules), "a class was made that nobody asked for"
from xeco_convert.families import WRAPPERS, supported_model_types
for source, spec in supported_model_types().items():
    config, own = AutoConfig.for_model(source), AutoConfig.for_model("xeco_" + source)
    assert type(own).__name__ == f"Xeco{spec.class_prefix}Config" and isinstance(own, type(config)), source
    assert own.model_type == "xeco_" + source
    tokenizers = tokenization_auto.TOKENIZER_MAPPING
    assert tokenizers.get(type(own), None) is tokenizers.get(type(config), None), source
    assert modeling_auto.MODEL_MAPPING[type(own)].__name__ == f"Xeco{spec.class_prefix}Model"
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]
    assert causal.__name__ == f"Xeco{spec.class_prefix}ForCausalLM" and causal.config_class is type(own)
    assert issubclass(causal, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
for table in (
    modeling_auto.MODEL_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
):
    own = [table[key] for key in table.keys() if key.__name__.startswith("Xeco")]
    assert own
    for made in own:  # vLLM checks arguments against annotations, and expects classes
        assert not any(isinstance(one, str) for one in made.__init__.__annotations__.values()), made
keys = {key.__name__ for key in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.keys()}
print(sorted(key for key in keys if key.startswith("Xeco")))
for name in ("NoSuchTokenizer", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2TokenizerFast"):  # looked for in every family's module
    tokenization_auto.tokenizer_class_from_name(name)
"""


def run(code: str, *, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_converted_folders_load_in_every_order_of_imports(order: str, llama: Path, converted: Path) -> None:
    """torch comes first in all of them, as it does in a program of its own: what takes part in this imports it."""
    folders = f"source, out = {str(llama)!r}, {str(converted)!r}"
    done = run_fresh("\n".join((folders, *ORDERS[order])))
    assert done.returncode == 0, done.stderr
    assert "trust_remote_code" not in done.stderr


@pytest.mark.slow
def test_every_family_is_registered_by_its_names_and_its_classes_are_made_when_asked_for() -> None:
    done = run_fresh(EVERY_FAMILY)
    assert done.returncode == 0, done.stderr
    names = [spec.class_prefix for spec in supported_model_types().values()]
    expected = sorted(
        f"Xeco{name}Config" for name in [*names, *(f"{prefix}Multimodal" for prefix in WRAPPERS.values())]
    )
    assert done.stdout.strip() == str(expected)


def test_importing_the_package_costs_no_import_of_torch_or_transformers() -> None:
    code = "import sys, xeco_convert; print([n for n in ('torch', 'transformers', 'numpy', 'tomllib') if n in sys.modules])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_tables_can_be_executed_again(converted: Path) -> None:
    code = (
        "import importlib, xeco_convert, transformers.models.auto.configuration_auto as c; importlib.reload(c); "
        f"print(c.AutoConfig.from_pretrained({str(converted)!r}).model_type)"
    )
    done = run_fresh(code)
    assert done.stdout.strip() == "xeco_llama", done.stderr


@pytest.mark.parametrize("hub_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("source", supported_model_types())
def test_a_tokenizer_resolves_as_that_of_the_source_does(source: str, hub_class: str | None, tmp_path: Path) -> None:
    """With any class named in tokenizer_config.json: transformers chooses by model_type, and so by the source's here."""
    from builders import write_tokenizer
    from transformers import AutoTokenizer

    found = []
    for model_type in (source, f"xeco_{source}"):
        folder = tmp_path / model_type
        folder.mkdir()
        write_tokenizer(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("tokenizer_class")
        settings |= {} if hub_class is None else {"tokenizer_class": hub_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            found.append((type(tokenizer), tokenizer("w5 w9 w80").input_ids))
        except Exception as error:  # the same refusal, where transformers cannot read such files as this class
            found.append((type(error), str(error).replace(model_type, source)))
    assert found[0] == found[1]
