"""Every error that a user can cause, each told in one sentence: what, where, expected, found, what to do.

The exit code says who has to act: 2 means that the command line must change, 1 that files, the model or the machine must.
"""

from __future__ import annotations

_LONGEST_REASON = 300
_TERSE = 60
_LONGEST_VALUE = 80
_LONGEST_SENTENCE = 2000


class XecoError(Exception):
    """Base of all errors that xeco-convert and xeco-distill raise on purpose; `str(error)` is the sentence."""

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        """Names and values out of files may hold what no terminal prints, half a surrogate pair or a line break: escaped."""
        super().__init__(_printable(sentence))


class XecoWarning(UserWarning):
    """Something that a conversion does on its own, and that the user should know: one sentence, as for errors."""


class OptionError(XecoError):
    """An option or argument that cannot be served: change the command line."""

    exit_code = 2


class CheckpointError(XecoError):
    """A source or converted checkpoint that is missing, damaged or not what its configuration says."""


class UnsupportedModelError(XecoError):
    """A model whose attention this version does not convert, with the reason."""


class OutputError(XecoError):
    """An output folder that could not be written; nothing is left behind in its place."""


class VerificationError(XecoError):
    """A converted layer that does not reproduce its source where it must."""


def _printable(text: str) -> str:
    if len(text) > _LONGEST_SENTENCE:
        text = f"{text[: _LONGEST_SENTENCE // 2]}…{text[-_LONGEST_SENTENCE // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of what a library's exception says: torch and yaml add traces and excerpts below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """What a library's exception says, on one line and not too long, for the brackets of a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError | AssertionError) and len(text) < _TERSE:
        text = f"{type(error).__name__}: {text}"  # "'metadata'" alone would say nothing
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def shown(value: object) -> str:
    """A value out of a file as an error gives it: on one line, printable, not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
