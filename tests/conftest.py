"""Settings of the whole suite: offline, one thread, remote code in a folder of its own; the shared checkpoints and texts."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")
from xeco_convert.commandline.run import share_cores  # imports no torch

share_cores()  # tests with two threads, beside whatever else the machine does
# A run in the background (nohup, a script's &) has Ctrl-C turned off, which processes inherit: tests of interrupts need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What torch.compile keeps between runs was compiled for whatever processor settings that run had, and breaks under others. One
# folder for all workers of pytest-xdist, which inherit it.
_COMPILED = tempfile.TemporaryDirectory(prefix="xeco_test_compiled_")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _COMPILED.name)
_MODULES = tempfile.TemporaryDirectory(prefix="xeco_test_modules_")
os.environ["HF_MODULES_CACHE"] = _MODULES.name

import pytest  # noqa: E402
import torch  # noqa: E402
from builders import build_checkpoint  # noqa: E402
from plots import drawn_alone  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import xeco_convert  # noqa: E402  registers the converted families

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
transformers_logging.disable_progress_bar()
_ROOT = Path(__file__).resolve().parents[1]
_FOLDER_FIXTURES = {"stories_converted", "tinystories_converted"}  # of tests/end_to_end: commands that take seconds


@pytest.fixture(scope="session", autouse=True)
def _modules_cache() -> Iterator[None]:
    yield
    _MODULES.cleanup()
    _COMPILED.cleanup()


@pytest.fixture(scope="session", autouse=True)
def _plots() -> Iterator[None]:
    """Conversions in this process draw their plots without rendering them: plots.py."""
    with drawn_alone():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and texts: $XECO_SHARED, or ../shared beside the repository."""
    folder = Path(os.environ.get("XECO_SHARED") or _ROOT.parent / "shared").resolve()
    if not (folder / "checkpoints").is_dir():
        reason = f"no shared checkpoints in {folder}; set XECO_SHARED to the folder that holds checkpoints/ and text/"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    return shared / "checkpoints" / "stories260k"


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> Path:
    return shared / "checkpoints" / "tinystories-gqa"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint with a tokenizer; not to be changed by tests."""
    return build_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama", tokenizer=True)


@pytest.fixture(scope="session")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted with the published initialisation; not to be changed by tests."""
    output = tmp_path_factory.mktemp("converted") / "llama"
    xeco_convert.convert(llama, output, init="paper", rank=12, rope_dim=4)
    return output


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions without their page, for tests that make very many."""
    monkeypatch.setattr("xeco_convert.conversion.report_page", lambda report: "")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where no GPU is present, and for no other reason. With `--dist loadgroup`, tests that share
    what is made once run in one worker of pytest-xdist, where it is made once."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU is present"))
        group = _group(item)
        if group and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(trylast=True, specname="pytest_collection_modifyitems")
def pytest_groups_in_node_ids(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-xdist 3.8 tells the group by an end of `_nodeid`, which pytest 9.2 no longer reads: without this, the groups that
    `--dist loadgroup` asks for are spread over all workers, and each makes again what one was to make."""
    for item in items:
        told = vars(item).get("_nodeid")
        if told and told != item.nodeid:
            item._id = type(item._id).parse(told)
        if getattr(config.option, "loadgroup", False) and item.get_closest_marker("xdist_group"):
            assert "@" in item.nodeid, "pytest-xdist would spread the group of this test over all workers"


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Trainers collect garbage at their ends, in a quarter of a second each time where all of torch, transformers and the tests
    is looked through: what is here by now stays until the end."""
    gc.collect()
    gc.freeze()


def _group(item: pytest.Item) -> str | None:
    """The file of a test with fixtures of its file, the folder of one with conversions of its folder; None for the others."""
    definitions = item._fixtureinfo.name2fixturedefs if hasattr(item, "_fixtureinfo") else {}
    if "libraries" in definitions:  # of tests/device: another worker would wait for the same compiler runs
        return "tests/device"
    if any(name in _FOLDER_FIXTURES for name in definitions):
        return item.path.parent.name
    if any(definition.scope == "module" for found in definitions.values() for definition in found):
        return str(item.path.relative_to(_ROOT))
    return None
