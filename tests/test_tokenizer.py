"""What is written reads text as its source does: every family, every kind of tokenizer, every way in which it is loaded."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import build_checkpoint
from tokenizer_kinds import KINDS, VOCABULARY, byte_level, metaspace, sentencepiece_model, tekken_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import xeco_convert
from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.checkpoint.companions import DOWNLOAD_PATTERNS, companion_files
from xeco_convert.conversion import model_identity
from xeco_convert.errors import CheckpointError, XecoWarning
from xeco_convert.export import export_checkpoint
from xeco_convert.families import supported_model_types
from xeco_convert.tokenizer import TokenizerFiles, first_difference, keeping, load_tokenizer, prepared_companions
from xeco_distill.errors import TeacherError
from xeco_distill.teacher import TeacherFiles, check_vocabulary

FAMILIES = supported_model_types()
# Written for this test, beside the probes of the package: what a user might type.
TEXTS = (
    "",
    " ",
    "def f(self):\n    return x[12345]",
    "  two  spaces ",
    "1234567 89",
    "naïve café",
    "中文 日本語",
    "👩‍👩‍👧‍👦 👍",
    "हिन्दी ภาษาไทย العربية",
    "a<extra>b <s>c</s> padded d",
    "\t\n\n x",
    "don't WE'LL",
)
CHAT = [{"role": "user", "content": "Hi 123"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": ""}]


def reading(tokenizer: Any) -> dict[str, Any]:
    """Ids of texts and a chat, and what they decode to."""
    ids = [[tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS] for special in (False, True)]
    chat = None
    if tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side]
    return {"ids": ids, "decoded": [tokenizer.decode(line) for line in ids[1]], "chat": chat, "special": special}


def folder_of(base: Path, kind: str, model_type: str) -> Path:
    """A source without weights."""
    folder = base / f"{model_type} {kind}".replace(",", "").replace(" ", "-")
    folder.mkdir(parents=True)
    KINDS[kind](folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": VOCABULARY}))
    return folder


# Families for which transformers chooses a tokenizer as it does for another: every third kind is tried on them.
ALIKE = {"gemma3_text": "gemma2", "mixtral": "granite", "olmo2": "granite", "qwen3_moe": "qwen3", "smollm3": "llama"}


def third_of_kinds(number: int) -> list[str]:
    return list(KINDS)[number % 3 :: 3]


def kinds_for(model_type: str) -> list[str]:
    """All, or a third where another family has all: each third comes up."""
    return third_of_kinds(list(ALIKE).index(model_type)) if model_type in ALIKE else list(KINDS)


def test_families_with_a_third_of_the_kinds_are_read_as_those_with_all() -> None:
    for model_type, other in ALIKE.items():
        assert other not in ALIKE
        assert TOKENIZER_MAPPING_NAMES.get(model_type) == TOKENIZER_MAPPING_NAMES.get(other), model_type


def loaded(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        return None


@pytest.mark.filterwarnings("ignore::xeco_convert.errors.XecoWarning")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_kind_reads_as_its_source_under_the_new_model_type(model_type: str, tmp_path: Path) -> None:
    config = model_identity(FAMILIES[model_type])
    compared, kinds = 0, kinds_for(model_type)
    for kind in kinds:
        source = folder_of(tmp_path, kind, model_type)
        expected = loaded(source)
        with prepared_companions(CheckpointIndex.without_weights(source), config) as folder:
            if expected is None:  # a class that needs tokenizer.json, where there is none: the source reads nothing
                continue
            found = AutoTokenizer.from_pretrained(folder)
            assert type(found) in (type(expected), PreTrainedTokenizerFast), kind
            wanted = reading(expected)
            assert reading(found) == wanted, kind
            found.save_pretrained(tmp_path / "copy")
            shutil.copy(folder / "config.json", tmp_path / "copy")
            assert reading(AutoTokenizer.from_pretrained(tmp_path / "copy")) == wanted, f"{kind}, saved again"
            shutil.rmtree(tmp_path / "copy")
        compared += 1
    assert compared >= len(kinds) - 1


@pytest.mark.filterwarnings("ignore::xeco_convert.errors.XecoWarning")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma2"])
def test_every_kind_reads_as_its_source_in_an_export(model_type: str, tmp_path: Path) -> None:
    """Engines read tokenizer.json alone, and so does transformers 5.16 for this model type. All kinds of llama, and once more of
    the others together."""
    for kind in KINDS if model_type == "llama" else third_of_kinds(["qwen2", "mistral", "gemma2"].index(model_type)):
        source = folder_of(tmp_path, kind, model_type)
        expected = loaded(source)
        index = CheckpointIndex.without_weights(source)
        with prepared_companions(index, {"model_type": "deepseek_v3"}, stock=True) as folder:
            if expected is not None:
                wanted = reading(expected)
                assert reading(AutoTokenizer.from_pretrained(folder)) == wanted, kind
                assert reading(PreTrainedTokenizerFast.from_pretrained(folder)) == wanted, kind


def test_files_that_say_it_themselves_are_left_as_they_are(tmp_path: Path) -> None:
    for kind in ("byte-level, PreTrainedTokenizerFast", "metaspace, LlamaTokenizer", "byte-level, Qwen2Tokenizer"):
        source = folder_of(tmp_path, kind, "llama")
        with prepared_companions(CheckpointIndex.without_weights(source), model_identity(FAMILIES["llama"])) as folder:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                assert (folder / name).read_bytes() == (source / name).read_bytes(), (kind, name)


REMOTE = """
import json, sys
sys.modules["xeco_convert"] = None
from transformers import AutoTokenizer
texts, folders = json.loads(sys.argv[1]), sys.argv[2:]
found = []
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found.append([tokenizer(text)["input_ids"] for text in texts])
print(json.dumps(found))
"""
VARIANT = {"gemma3_text": "gemma3"}


@pytest.fixture(scope="module")
def converted_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Source, conversion and a copy saved by transformers, of a family; each has another kind of tokenizer. Made once."""
    base, made = tmp_path_factory.mktemp("families"), {}
    words = base / "words.json"
    words.write_text(json.dumps([[(7 * n + m) % 600 for n in range(16)] for m in range(100)]))
    kinds = [kind for kind in KINDS if "vocab.json" not in kind]

    def make(model_type: str) -> tuple[Path, Path, Path]:
        if model_type not in made:
            places = base / model_type, base / f"{model_type}.out", base / f"{model_type}.copy"
            build_checkpoint(places[0], VARIANT.get(model_type, model_type), vocab_size=VOCABULARY)
            KINDS[kinds[list(FAMILIES).index(model_type) % len(kinds)]](places[0])
            xeco_convert.convert(places[0], places[1], rank=8, calibration=str(words), calibration_tokens=1600)
            AutoModelForCausalLM.from_pretrained(places[1]).save_pretrained(places[2])
            AutoTokenizer.from_pretrained(places[1]).save_pretrained(places[2])
            made[model_type] = places
        return made[model_type]

    return make


Families = Callable[[str], tuple[Path, Path, Path]]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_conversion_and_its_copy_read_as_the_source(model_type: str, converted_family: Families) -> None:
    source, output, copy = (reading(AutoTokenizer.from_pretrained(folder)) for folder in converted_family(model_type))
    assert output == source
    assert copy == source


def test_without_the_package_all_of_them_read_as_the_source(converted_family: Families, tmp_path: Path) -> None:
    folders, expected = [], []
    for model_type in FAMILIES:
        source, *written = converted_family(model_type)
        folders += [str(folder) for folder in written]
        expected += [[AutoTokenizer.from_pretrained(source)(text)["input_ids"] for text in TEXTS]] * len(written)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REMOTE, json.dumps(TEXTS), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_an_export_reads_as_the_source_of_the_conversion(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "in", "llama", vocab_size=VOCABULARY)
    KINDS["metaspace, legacy LlamaTokenizer"](source)
    words = tmp_path / "words.json"
    words.write_text(json.dumps([[(7 * n + m) % 600 for n in range(64)] for m in range(32)]))
    xeco_convert.convert(
        source, tmp_path / "out", rank=12, rope_dim=8, portable=True, calibration=str(words), calibration_tokens=2048
    )
    export_checkpoint(tmp_path / "out", tmp_path / "stock")
    expected = reading(AutoTokenizer.from_pretrained(source))
    assert reading(AutoTokenizer.from_pretrained(tmp_path / "stock")) == expected
    assert reading(PreTrainedTokenizerFast.from_pretrained(tmp_path / "stock")) == expected


def test_a_tokenizer_that_cannot_be_kept_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_checkpoint(tmp_path / "in", "granite", vocab_size=VOCABULARY)
    KINDS["byte-level, GPT2Tokenizer"](source)
    monkeypatch.setattr(keeping, "_name_class", lambda folder, name: None)
    monkeypatch.setattr(keeping, "_write_resolved", lambda source, folder: None)
    with pytest.raises(
        CheckpointError, match=r"would read text otherwise in what is written: the text .* gives .*, expected"
    ):
        xeco_convert.convert(source, tmp_path / "out", init="paper", rank=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_tokenizer_that_does_not_load_is_copied_with_a_warning(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "in", "llama")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.warns(XecoWarning, match=r"no tokenizer could be loaded.*copied as they are, their ids not compared"):
        xeco_convert.convert(source, tmp_path / "out", init="paper", rank=8)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_source_without_tokenizer_converts_on_token_ids(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "in", "llama", vocab_size=VOCABULARY)
    words = tmp_path / "words.json"
    words.write_text(json.dumps([[(7 * n + m) % 600 for n in range(64)] for m in range(32)]))
    xeco_convert.convert(source, tmp_path / "out", rank=8, calibration=str(words), calibration_tokens=1600)
    assert not [path.name for path in (tmp_path / "out").iterdir() if "token" in path.name]


OWN_CODE = """
from transformers import PreTrainedTokenizerFast
from .own_words import WORDS

VOCAB_FILES_NAMES = {"vocab_file": "my_words.txt", "tokenizer_file": "tokenizer.json"}

class OwnTokenizer(PreTrainedTokenizerFast):
    def _extra(self):
        return WORDS
"""


def own_code(folder: Path) -> None:
    byte_level().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text(OWN_CODE)
    (folder / "own_words.py").write_text("from .own_more import MORE\n\nWORDS = ('a', *MORE)\n")
    (folder / "own_more.py").write_text("MORE = ('b',)\n")
    (folder / "my_words.txt").write_bytes(b"\x00words")
    (folder / "unrelated.py").write_text("1/0\n")
    (folder / "tekken.json").write_text("{}")


def test_code_of_a_tokenizer_is_copied_and_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = build_checkpoint(tmp_path / "in", "llama", vocab_size=VOCABULARY)
    own_code(source)
    sentence = r"the tokenizer is code of its own \(tokenization_own.OwnTokenizer\), which xeco-convert does not run"
    with pytest.warns(XecoWarning, match=sentence):
        xeco_convert.convert(source, tmp_path / "out", init="paper", rank=8)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenization_own.py", "own_words.py", "own_more.py", "my_words.txt", "tekken.json"} <= names
    assert "unrelated.py" not in names
    with pytest.raises(CheckpointError, match=sentence):
        load_tokenizer(source)
    both = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in (source, tmp_path / "out")]
    assert [type(tokenizer).__name__ for tokenizer in both] == ["OwnTokenizer"] * 2
    assert reading(both[0]) == reading(both[1])


def test_names_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    source = tmp_path / "in"
    source.mkdir()
    (source / "model.safetensors").write_text("")
    named = ["../secret.txt", str(tmp_path / "secret.txt"), "model.safetensors", "config.json", "", "\0", "a" * 5000]
    settings = {"auto_map": {"AutoTokenizer": ["..secret.X", "a/../../b.Y"]}, "files": named}
    (source / "config.json").write_text("{}")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert companion_files(source) == [Path("tokenizer_config.json")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *[(name, True) for name in ("tekken.json", "source.spm", "spiece.model", "vocab.txt", "tokenization_own.py")],
        *[(name, True) for name in ("tokenizer.model.v3", "own_words.py", "qwen.tiktoken", "chat_template.jinja")],
        *[(name, False) for name in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "model.safetensors")],
    ],
)
def test_a_download_takes_what_the_tokenizer_may_need(name: str, wanted: bool) -> None:
    assert any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOAD_PATTERNS) is wanted


def changed(change: Callable[[dict[str, Any], dict[str, Any]], None], folder: Path) -> Any:
    """The metaspace tokenizer, its two files changed."""
    folder.mkdir()
    KINDS["metaspace, PreTrainedTokenizerFast"](folder)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    rules, settings = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    change(rules, settings)
    for file, data in zip(files, (rules, settings), strict=True):
        file.write_text(json.dumps(data), encoding="utf-8")
    return load_tokenizer(folder)


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "nothing": (lambda rules, settings: None, ""),
    "first space": (lambda rules, settings: rules["pre_tokenizer"].update(prepend_scheme="never"), "the text"),
    "normaliser": (lambda rules, settings: rules.update(normalizer={"type": "NFKC"}), "the text"),
    "begin": (lambda rules, settings: rules.update(post_processor=None), "with special tokens"),
    "decoder": (lambda rules, settings: rules.update(decoder=None), "decoded"),
    "added token": (lambda rules, settings: rules["added_tokens"][5].update(rstrip=True), "the text"),
    "vocabulary": (lambda rules, settings: rules["model"]["vocab"].pop("<0x00>"), "is no token, expected '<0x00>'"),
    "side": (lambda rules, settings: settings.update(padding_side="left"), "padding_side"),
    "limit": (lambda rules, settings: settings.update(model_max_length=7), "model_max_length"),
    "end": (lambda rules, settings: settings.update(eos_token="<pad>"), "special_tokens_map"),
    "template": (lambda rules, settings: settings.update(chat_template="{{ messages }}"), "chat_template"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_first_probe_that_differs_is_named(name: str, tmp_path: Path) -> None:
    reference = changed(CHANGES["nothing"][0], tmp_path / "reference")
    change, words = CHANGES[name]
    found = first_difference(reference, changed(change, tmp_path / "changed"))
    assert (found is None) == (name == "nothing")
    if found is not None:
        assert words in str(found) and ", expected " in str(found)
    if name in ("side", "limit", "end", "template"):
        assert first_difference(reference, load_tokenizer(tmp_path / "changed"), settings=False) is None


def test_a_student_that_reads_otherwise_than_its_teacher_is_refused_with_the_probe(tmp_path: Path) -> None:
    """Whatever the model types are: another rule for digits, here."""
    source = folder_of(tmp_path, "byte-level, GPT2Tokenizer", "olmo2")
    student = tmp_path / "student"
    shutil.copytree(source, student)
    (student / "config.json").write_text(json.dumps({**model_identity(FAMILIES["olmo2"]), "vocab_size": VOCABULARY}))
    rules = json.loads((student / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, rules["pre_tokenizer"]]}
    (student / "tokenizer.json").write_text(json.dumps(rules))
    teacher = TeacherFiles(index=CheckpointIndex.without_weights(source), name="T", is_source=True)
    with pytest.raises(
        TeacherError, match=r"T: its tokenizer differs .*the text '.*' gives .*, for the student .*refresh"
    ):
        check_vocabulary(CheckpointIndex.without_weights(student), teacher)
    keeping.keep_tokenizer(TokenizerFiles(folder=source), student)
    check_vocabulary(CheckpointIndex.without_weights(student), teacher)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("stock", [False, True])
def test_sentencepiece_files_alone_are_kept(model_type: str, stock: bool, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    source = tmp_path / "in"
    source.mkdir()
    sentencepiece_model(source)
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"model_type": "deepseek_v3"} if stock else model_identity(FAMILIES[model_type])
    with prepared_companions(CheckpointIndex.without_weights(source), config, stock=stock) as folder:
        assert reading(AutoTokenizer.from_pretrained(folder)) == reading(AutoTokenizer.from_pretrained(source))
        assert (folder / "tokenizer.model").is_file()


@pytest.mark.parametrize("stock", [False, True])
def test_mistral_common_stays_what_reads_a_tekken_file(stock: bool, tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    source = tmp_path / "in"
    source.mkdir()
    tekken_file(source)
    (source / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    config = {"model_type": "deepseek_v3"} if stock else model_identity(FAMILIES["mistral"])
    with prepared_companions(CheckpointIndex.without_weights(source), config, stock=stock) as folder:
        assert (folder / "tekken.json").is_file()
        for text in TEXTS:
            found, expected = (AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (folder, source))
            assert found == expected, text


def test_a_resolved_tokenizer_says_all_that_its_class_said(tmp_path: Path) -> None:
    """Sides, names of inputs and special tokens that only the class knew are in the files of an export."""
    source = tmp_path / "in"
    source.mkdir()
    metaspace(scheme="always").save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (source / "config.json").write_text('{"model_type": "llama"}')
    expected = AutoTokenizer.from_pretrained(source)
    index = CheckpointIndex.without_weights(source)
    with prepared_companions(index, {"model_type": "deepseek_v3"}, stock=True) as folder:
        found = PreTrainedTokenizerFast.from_pretrained(folder)
        assert (found.padding_side, found.eos_token, found.model_input_names) == (
            expected.padding_side,
            expected.eos_token,
            expected.model_input_names,
        )
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        assert stated["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in stated
