"""Loading a tokenizer as transformers does, without a question on the terminal and without running code of the checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xeco_convert.checkpoint import CheckpointIndex
from xeco_convert.checkpoint.companions import tokenizer_code, tokenizer_files, tokenizer_settings
from xeco_convert.checkpoint.index import read_json
from xeco_convert.errors import CheckpointError, reason_of


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Where a tokenizer is: its files, and the hub id and commit where it has them: transformers decides by the id too."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, index: CheckpointIndex) -> TokenizerFiles:
        return cls(folder=index.folder, hub_id=index.hub_id, revision=index.revision)

    @property
    def exists(self) -> bool:
        """Whether there is a tokenizer at all."""
        return bool(tokenizer_files(self.folder))

    @property
    def own_code(self) -> list[str]:
        """Classes of the tokenizer's own code."""
        return tokenizer_code(tokenizer_settings(self.folder))

    def load(self) -> Any:
        """What `AutoTokenizer` gives here. Raises `CheckpointError` in one sentence."""
        from transformers import AutoTokenizer

        name, options = (self.folder, {}) if self.hub_id is None else (self.hub_id, {"revision": self.revision})
        with self.explained(), quiet():
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False, **options)

    def load_without_package(self) -> Any:
        """What it gives where nobody knows the folder's model type: this package is not installed."""
        from transformers import AutoTokenizer, PreTrainedConfig

        stated = read_json(self.folder / "config.json").get("tokenizer_class")
        config = PreTrainedConfig(tokenizer_class=stated if isinstance(stated, str) else None)
        with self.explained(), quiet():
            return AutoTokenizer.from_pretrained(
                self.folder, config=config, local_files_only=True, trust_remote_code=False
            )

    def load_saved_again(self) -> Any:
        """What it gives for a copy that transformers saved: not every class comes back as it was."""
        with tempfile.TemporaryDirectory(prefix="xeco-tokenizer-") as place:
            tokenizer = self.load()
            with self.explained(), quiet():
                tokenizer.save_pretrained(place)
            shutil.copyfile(self.folder / "config.json", Path(place) / "config.json")
            return TokenizerFiles(folder=Path(place)).load()

    def load_backend(self) -> Any:
        """What tokenizer.json says, whatever class is named beside it: how engines read it."""
        from transformers import PreTrainedTokenizerFast

        with self.explained(), quiet():
            return PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)

    def explained(self) -> AbstractContextManager[None]:
        """Errors of loading, of many libraries, as one sentence."""
        return tokenizer_errors(self._not_loaded)

    def _not_loaded(self, reason: str) -> CheckpointError:
        if self.own_code and "custom code" in reason:
            return CheckpointError(
                f"{self.folder}: the tokenizer is code of its own ({', '.join(self.own_code)}), which xeco-convert does not "
                "run; where text is asked for, give token ids instead (a .json file)."
            )
        return CheckpointError(
            f"{self.folder}: no tokenizer could be loaded ({reason}), which text needs; add the tokenizer files."
        )


@contextmanager
def tokenizer_errors(explained: Callable[[str], CheckpointError]) -> Iterator[None]:
    """Whatever a tokenizer or a template raises, in a sentence made from its reason. A panic of the tokenizers library is
    no Exception for Python."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise explained(reason_of(error)) from None
        raise


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises `CheckpointError` where it has none that loads."""
    return TokenizerFiles(folder=folder).load()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on what is loaded: whoever loads the result reads them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
