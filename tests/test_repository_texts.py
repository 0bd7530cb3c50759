"""Documents say what is there: links lead somewhere, flags exist, and nothing refers to papers that a reader does not have."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("xeco_convert", "distill", "csrc", "docs", "examples", "benchmarks", "scripts", "tests", ".github", ".ci")
TEXTS = {".md", ".py", ".sh", ".yml", ".yaml", ".toml", ".cff", ".cpp", ".cc", ".h", ".cu", ".cuh", ".txt", ".in", ""}
SUBCOMMANDS = {"xeco-convert": ("sweep", "inspect", "export", "refresh"), "xeco-distill": ("eval", "recipes")}
# Flags of other programs that the documents name alone.
FOREIGN = {
    "--attention-backend", "--enforce-eager", "--max-model-len", "--model-impl", "--decode-context-parallel-size",  # vLLM
    "--tensor-parallel-size", "--data-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend",
    "--trust-remote-code",  # vLLM, transformers serve
    "--model", "--model_args",  # lm-eval
    "--node-rank", "--no-build-isolation",  # torchrun, pip
}  # fmt: skip
# Papers of the developers that are no part of the repository.
ABSENT = re.compile(
    r"(?<![\w/$])(?:\.\./)?shared/|\bthe issue\b|\bthe design\b(?! of)|\bdesign document|\barchitecture\.md\b|\bhouse\.md\b",
    re.IGNORECASE,
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"--[a-z][\w-]*")


def texts() -> Iterator[Path]:
    """Every text file of the repository but this one."""
    yield from (file for file in ROOT.iterdir() if file.is_file() and file.suffix in TEXTS - {""})
    yield ROOT / "Makefile"
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in TEXTS and "__pycache__" not in file.parts and file != Path(__file__):
                yield file


def documents() -> list[Path]:
    return sorted(file for file in texts() if file.suffix == ".md")


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_no_text_refers_to_what_a_reader_does_not_have() -> None:
    places = [
        f"{name(file)}:{number}: {line.strip()}"
        for file in texts()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if ABSENT.search(line)
    ]
    assert not places, "\n".join(places)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    without_code = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(line.lstrip("#")) for line in without_code.splitlines() if re.match(r"#{1,6} ", line)}


@pytest.mark.parametrize("file", documents(), ids=name)
def test_links_lead_to_files_and_headings(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: {name(linked)} has no such heading"


@functools.cache
def flags(command: str, subcommand: str | None = None) -> frozenset[str]:
    """The flags that `command --help` lists."""
    import contextlib
    import io

    from xeco_convert.cli import main as convert
    from xeco_distill.cli import main as distill

    main = convert if command == "xeco-convert" else distill
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        main([*([subcommand] if subcommand else []), "--help"])
    assert ended.value.code == 0
    listed = re.findall(r"^  (--\S+)(?: / (--\S+))?", output.getvalue(), flags=re.MULTILINE)
    return frozenset(flag for pair in listed for flag in pair if flag)


def all_flags() -> set[str]:
    return {
        flag
        for command, subcommands in SUBCOMMANDS.items()
        for subcommand in (None, *subcommands)
        for flag in flags(command, subcommand)
    }


def code(file: Path) -> Iterator[str]:
    """Lines of code blocks, continued lines joined, and code between backticks; of a script every line."""
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    if file.suffix != ".md":
        yield from text.splitlines()
        return
    blocks = re.findall(r"^```.*?^```|(?:^    .*\n)+", text, flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from block.splitlines()
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """(xeco-convert or xeco-distill, its arguments) of a line of code, without what is behind a comment sign or a pipe."""
    for match in re.finditer(r"(?:^|[\s(])(xeco-convert|xeco-distill|-m xeco_distill)(\s[^#|&;\"]*)", line):
        yield match[1].replace("-m xeco_distill", "xeco-distill"), match[2].replace("'", "").split()


USED = [*documents(), *sorted((ROOT / "examples").glob("*.py")), ROOT / "Makefile"]


@pytest.mark.parametrize("file", USED, ids=name)
def test_commands_use_flags_that_exist(file: Path) -> None:
    for line in code(file):
        for command, arguments in commands(line):
            first = arguments[0] if arguments else None
            subcommand = first if first in SUBCOMMANDS[command] else None
            for flag in (FLAG.match(argument) for argument in arguments):
                if flag is not None:
                    assert flag[0] in flags(command, subcommand), f"{line.strip()}: {command} has no {flag[0]}"


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=name)
def test_flags_that_are_named_alone_exist(file: Path) -> None:
    known = all_flags() | FOREIGN
    for piece in code(file):
        if piece.startswith("--"):
            assert set(FLAG.findall(piece)) <= known, piece


def test_benchmarks_are_called_with_arguments_that_they_have() -> None:
    checked = 0
    for file in documents():
        for line in code(file):
            for script, rest in re.findall(r"python benchmarks/(\w+\.py)([^#]*)", line):
                source = (ROOT / "benchmarks" / script).read_text(encoding="utf-8")
                for flag in FLAG.findall(rest.replace("--help", "")):
                    assert f'"{flag}"' in source, f"{name(file)}: {line.strip()}"
                    checked += 1
    assert checked > 30


def test_the_readme_has_the_two_commands_that_make_everything() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in ("demo", "test"):
        assert target in targets
        assert any(shlex.split(line, comments=True) == ["make", target] for line in lines)


def test_every_result_page_says_when_and_where_its_files_were_measured() -> None:
    """Each JSON file of results/ is on one page, with the date that stands in it; the first where each row has its own."""
    import json

    pages = {page: page.read_text(encoding="utf-8") for page in (ROOT / "benchmarks" / "results").glob("*.md")}
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        rows = [data] if "machine" in data else list(data["rows"].values())
        measured = [each for row in rows for each in ([row] if "machine" in row else row["points"])]
        date = min(each["machine"]["date"] for each in measured)
        named = [text for text in pages.values() if f"| `{file.name}` | {date} |" in text]
        assert len(named) == 1, f"{file.name} of {date}"


def test_citation_and_forms_are_whole() -> None:
    import xeco_convert

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == xeco_convert.__version__
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"):
        data = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(data)
        identifiers = [field["id"] for field in data["body"] if field["type"] != "markdown"]
        assert len(identifiers) == len(set(identifiers)) > 2


def test_every_new_document_is_in_the_sdist() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for wanted in ("recursive-include examples *", "recursive-include docs *", "SECURITY.md", "CITATION.cff"):
        assert wanted in manifest
