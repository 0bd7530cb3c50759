"""Tiny tokenizers of the kinds that published models have, written as their files: the rules differ, and who states them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 640
_WORDS = (
    "the cat sat on a mat and the dogs ran over it while 12345 67890 people don't say what def return self x y "
    "naïve café Straße 中文文本 日本語 العربية हिन्दी ภาษาไทย русский текст 👍 🏳️‍🌈 camelCase snake_case [INST] == != && || "
)
# One sign may lead a word in the pattern below, which GPT-2's does not allow: "(self" becomes a token.
_TEXT = [
    _WORDS * 3,
    "def f(self): g(self) h(self, x) [x] " * 60,
    *(f"{number} {number * 7919}" for number in range(300)),
    "    return x[0]\n\tif a:\n\n",
]
_CHAT = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_DIGITS_IN_THREES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]


def _write(folder: Path, tokenizer: Tokenizer | None, **settings: Any) -> None:
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    stated = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "chat_template": _CHAT,
    }
    text = json.dumps({**stated, **settings}, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_level(pattern: str | None = _DIGITS_IN_THREES, *, bos: bool = False) -> Tokenizer:
    """Bytes, split by a pattern of its own; None: by GPT-2's."""
    words = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    words.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        words,
        trainers.BpeTrainer(vocab_size=600, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    words.add_tokens([AddedToken("<extra>", normalized=False), AddedToken(" padded ", lstrip=True, rstrip=True)])
    return words


def bytes_alone(*special: str) -> Tokenizer:
    """The 256 bytes in the order of their letters, then the special tokens; no merges."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=letters, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(list(special))
    return words


def metaspace(*, scheme: str = "first") -> Tokenizer:
    """SentencePiece's kind of BPE: spaces become a sign, unknown letters become bytes."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*_SPECIAL, *(f"<0x{number:02X}>" for number in range(256))]
    _train(words, trainers.BpeTrainer(vocab_size=600, special_tokens=_SPECIAL, show_progress=False, limit_alphabet=200))
    data = json.loads(words.to_str())
    vocabulary = data["model"]["vocab"]
    for token in special[len(_SPECIAL) :]:
        vocabulary.setdefault(token, len(vocabulary))
    words = Tokenizer.from_str(json.dumps(data))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return words


def word_level() -> Tokenizer:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    _train(words, trainers.WordLevelTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False))
    return words


def unigram() -> Tokenizer:
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=6
    )
    _train(words, trainer)
    return words


def _train(words: Tokenizer, trainer: Any) -> None:
    words.train_from_iterator(_TEXT, trainer)


def _files_of_gpt2(folder: Path) -> None:
    """vocab.json and merges.txt, as before tokenizer.json."""
    byte_level(None).model.save(str(folder))
    _write(folder, None, tokenizer_class="GPT2Tokenizer", unk_token="<unk>")


def _silent(folder: Path) -> None:
    byte_level().save(str(folder / "tokenizer.json"))


def _older_places(folder: Path) -> None:
    """Special tokens in files of their own, as transformers 4 wrote them."""
    _write(folder, byte_level(), tokenizer_class="GPT2TokenizerFast", chat_template=None)
    (folder / "chat_template.jinja").write_text(_CHAT, encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|user|>", "additional_special_tokens": ["<|assistant|>"]}), encoding="utf-8"
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 600, " padded ": 601}), encoding="utf-8")


def _stated(make: Callable[[], Tokenizer], name: str | None, **settings: Any) -> Callable[[Path], None]:
    stated = {} if name is None else {"tokenizer_class": name}
    return lambda folder: _write(folder, make(), **stated, **settings)


# name -> writes the files into a folder
KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level, GPT2Tokenizer": _stated(byte_level, "GPT2Tokenizer", add_prefix_space=False),
    "byte-level, GPT2 with prefix space": _stated(byte_level, "GPT2TokenizerFast", add_prefix_space=True),
    "byte-level, LlamaTokenizerFast": _stated(lambda: byte_level(bos=True), "LlamaTokenizerFast", legacy=False),
    "byte-level, PreTrainedTokenizerFast": _stated(lambda: byte_level(bos=True), "PreTrainedTokenizerFast"),
    "byte-level, TokenizersBackend": _stated(byte_level, "TokenizersBackend", padding_side="left"),
    "byte-level, Qwen2Tokenizer": _stated(byte_level, "Qwen2Tokenizer", errors="replace"),
    "byte-level, GPTNeoXTokenizer": _stated(lambda: byte_level(None), "GPTNeoXTokenizer"),
    "byte-level, no class": _stated(byte_level, None),
    "byte-level, a class that is no more": _stated(byte_level, "Gone9Tokenizer"),
    "byte-level, tokenizer.json alone": _silent,
    "byte-level, files of transformers 4": _older_places,
    "vocab.json and merges.txt": _files_of_gpt2,
    "metaspace, LlamaTokenizer": _stated(metaspace, "LlamaTokenizer", add_bos_token=True, legacy=False),
    "metaspace, legacy LlamaTokenizer": _stated(lambda: metaspace(scheme="always"), "LlamaTokenizer", legacy=True),
    "metaspace, GemmaTokenizer": _stated(lambda: metaspace(scheme="never"), "GemmaTokenizer"),
    "metaspace, PreTrainedTokenizerFast": _stated(metaspace, "PreTrainedTokenizerFast"),
    "metaspace, no class": _stated(metaspace, None),
    "unigram, T5Tokenizer": _stated(unigram, "T5Tokenizer", extra_ids=0),
    "unigram, PreTrainedTokenizerFast": _stated(unigram, "PreTrainedTokenizerFast"),
    "words, PreTrainedTokenizerFast": _stated(word_level, "PreTrainedTokenizerFast", model_max_length=64),
    "words, no class": _stated(word_level, None, add_eos_token=True),
}


def sentencepiece_model(folder: Path) -> None:
    """tokenizer.model and its settings, no tokenizer.json."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(_TEXT * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<|user|>"], minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    _write(folder, None, tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=False)


def tekken_file(folder: Path) -> None:
    """tekken.json as mistral-common reads it: bytes, a few words and twenty special tokens."""
    words = [bytes([number]) for number in range(256)] + [b" t", b"he", b" the", b"12", b"at"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    names = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    names += (
        "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    )
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names.split())]
    config = {"pattern": _DIGITS_IN_THREES, "num_vocab_tokens": len(words), "default_vocab_size": len(words) + 20}
    config = {**config, "default_num_special_tokens": 20, "version": "v7"}
    data = {"config": config, "vocab": vocabulary, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
