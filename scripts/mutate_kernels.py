"""Do the tests of the ops find mistakes in the kernels? Makes those of kernel_mutations.toml, one at a time, in a copy.

    python scripts/mutate_kernels.py --work /tmp/mutants                          all of them, by the tests of this tree
    python scripts/mutate_kernels.py --work /tmp/mutants --only "soft cap"        those whose name has these words
    python scripts/mutate_kernels.py --work /tmp/mutants --tests A/tests B/tests  what A misses, does B find it?

The copy in --work is compiled once, with -O1, and used again as long as csrc/ and xeco_convert/ops/ are the same; a mistake
compiles the files that it is in, or the one file of its instruction set, whose tests alone are run then. About half a minute
for each on one core. Prints the test that found each, and exits with 1 where the tests of the first tree missed one.
Mistakes of instruction sets that this machine does not have are left out; XECO_EMULATE_AMX=1 builds AMX everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("kernel_mutations.toml")
SOURCES = {"csrc": (".cpp", ".h", ".inc"), "xeco_convert/ops": (".py",)}
ATTENTION_TESTS = ("test_latent_attention.py", "test_latent_attention_decode.py", "test_rounding.py")
MARKER = ".mutated"  # a copy that was left in the middle of a mistake
SECONDS = 900  # of the tests of one mistake: a mistake may make a kernel run forever


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One mistake; kernel_mutations.toml says what the fields are."""

    name: str
    old: str
    new: str
    level: str | None = None
    count: int = 1
    tests: tuple[str, ...] = ATTENTION_TESTS

    def pattern(self) -> re.Pattern[str]:
        """Of the old text, with any white space where it has some."""
        return re.compile(r"\s+".join(re.escape(word) for word in self.old.split()))

    def files(self, tree: Path) -> list[Path]:
        """The files that have the old text. Raises `ValueError` where it does not occur as often as it should."""
        counts = {file: len(self.pattern().findall(file.read_text("utf-8"))) for file in source_files(tree)}
        total = sum(counts.values())
        if total != self.count:
            raise ValueError(f"'{self.name}': expected {self.count} times in csrc and ops, found {total}: {self.old}")
        return [file for file, number in counts.items() if number]


def mutations() -> list[Mutation]:
    """All, in the order of the file."""
    entries = tomllib.loads(LIST.read_text("utf-8"))["mutation"]
    return [Mutation(**{**entry, "tests": tuple(entry.get("tests", ATTENTION_TESTS))}) for entry in entries]


def source_files(tree: Path) -> list[Path]:
    """What mistakes are made in: the CPU's kernels and the ops in Python."""
    return [
        file
        for folder, suffixes in SOURCES.items()
        for file in sorted((tree / folder).rglob("*"))
        if file.suffix in suffixes
    ]


@dataclass(frozen=True, kw_only=True)
class Build:
    """A compiled copy of the tree: the command of each source file, and the one that links."""

    tree: Path
    compile_commands: dict[Path, str]
    objects: dict[Path, Path]
    includes: dict[Path, set[Path]]
    link_command: str

    def units_of(self, mutation: Mutation, files: Sequence[Path]) -> list[Path]:
        """The source files to compile again."""
        touched = {file.resolve() for file in files}
        units = [unit for unit, includes in self.includes.items() if touched & (includes | {unit})]
        if mutation.level is None:
            return units
        return [unit for unit in units if level_of(unit) == mutation.level]

    def compile(self, units: Sequence[Path]) -> None:
        """Compiles and links in place."""
        for unit in units:
            run(self.compile_commands[unit], self.tree)
        if units:
            run(self.link_command, self.tree)

    @contextmanager
    def with_mutation(self, mutation: Mutation) -> Iterator[None]:
        """The copy with one mistake; what it was before comes back afterwards."""
        files = mutation.files(self.tree)
        units = self.units_of(mutation, files)
        changed = [*files, *(self.objects[unit] for unit in units), *library(self.tree)]
        before = {file: file.read_bytes() for file in changed}
        marker = self.tree / MARKER
        marker.touch()
        try:
            for file in files:
                file.write_text(mutation.pattern().sub(lambda _: mutation.new, file.read_text("utf-8")), "utf-8")
            self.compile(units)
            yield
        finally:
            for file, content in before.items():
                file.unlink(missing_ok=True)  # not in place: a process that is still there may have the library mapped
                file.write_bytes(content)
            marker.unlink()


def level_of(unit: Path) -> str | None:
    """The instruction set that a source file is compiled for; "first" is the one for any processor."""
    text = unit.read_text("utf-8")
    name = re.search(r"#define XECO_ISA (\w+)", text)
    if name is None:
        return None
    return name.group(1) if "#define XECO_TARGET" in text else "first"


def library(tree: Path) -> list[Path]:
    return sorted((tree / "xeco_convert").glob("_C.*.so"))


def run(command: str, folder: Path) -> str:
    """What a command prints. Exits with it where it fails."""
    result = subprocess.run(
        shlex.split(command), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"mutate_kernels: {command}\n{result.stdout}")
    return result.stdout


def prepared(work: Path) -> Build:
    """The copy of this tree, compiled."""
    tree, notes = work / "tree", work / "build.json"
    key = hashlib.sha256(b"".join(file.read_bytes() for file in [*source_files(ROOT), ROOT / "setup.py"])).hexdigest()
    if (tree / MARKER).exists() or not notes.exists() or json.loads(notes.read_text("utf-8"))["key"] != key:
        notes.unlink(missing_ok=True)
        shutil.rmtree(tree, ignore_errors=True)
        copy_tree(tree)
        link_command = build(tree)
        notes.write_text(json.dumps({"key": key, "link": link_command}), "utf-8")
    folder = next(tree.glob("build/temp*"))
    units = {
        Path(entry["file"]).resolve(): entry for entry in json.loads(run("ninja -t compdb", folder)) if entry["file"]
    }
    units = {unit: entry for unit, entry in units.items() if unit.suffix == ".cpp"}
    objects = {unit: folder / entry["output"] for unit, entry in units.items()}
    return Build(
        tree=tree,
        compile_commands={unit: entry["command"] for unit, entry in units.items()},
        objects=objects,
        includes={unit: includes_of(folder, entry["output"], tree) for unit, entry in units.items()},
        link_command=json.loads(notes.read_text("utf-8"))["link"],
    )


def copy_tree(tree: Path) -> None:
    for name in ("csrc", "xeco_convert", "distill"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)


def build(tree: Path) -> str:
    """Compiles the copy; returns the command that linked it."""
    settings = {"XECO_BUILD_EXT": "1", "XECO_BUILD_DEVICE": "0", "XECO_CXXFLAGS": "-O1"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    links = [line for line in result.stdout.splitlines() if " -shared " in line and "_C." in line]
    if result.returncode or not links:
        sys.exit(f"mutate_kernels: the copy in {tree} does not compile\n{result.stdout}")
    # setuptools links into build/ and copies from there
    made = library(tree)[0]
    return re.sub(r"-o \S+", f"-o {made}", links[-1])


def includes_of(folder: Path, target: str, tree: Path) -> set[Path]:
    lines = run(shlex.join(["ninja", "-t", "deps", target]), folder).splitlines()[1:]
    paths = {(folder / line.strip()).resolve() for line in lines if line.strip()}
    return {path for path in paths if path.is_relative_to(tree.resolve())}


def found_by(tree: Path, tests: Path, mutation: Mutation | None, level: str | None) -> str | None:
    """The first test (of a level) that fails, or how the tests ended; None where all pass."""
    names = mutation.tests if mutation else sorted({name for each in mutations() for name in each.tests})
    files = [str(tests / "ops" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-k", level] if level else []
    # tests/conftest.py imports transformers, which the tests of the ops have no need of
    command += ["-c", str(tree / "pyproject.toml"), "--rootdir", str(tests.parent), "--confcutdir", str(tests / "ops")]
    command += files
    settings = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if result.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+?::.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if failed:
        return failed.group(1)
    if result.returncode < 0:
        return f"the process ended by signal {-result.returncode}"
    sys.exit(f"mutate_kernels: {shlex.join(command)}\n{result.stdout}{result.stderr}")


def available_levels(tree: Path) -> dict[str, str]:
    """Names of the instruction sets that this machine has, by what mutations call them."""
    code = (
        "from xeco_convert.ops.extension import CPU_LEVELS, extension; module = extension();"
        "print(*CPU_LEVELS[: CPU_LEVELS.index(module.detected_level) + 1])"
    )
    names = run(shlex.join([sys.executable, "-c", code]), tree).split()
    return {"first": names[0], **{name: name for name in names[1:]}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the compiled copy")
    parser.add_argument("--tests", type=Path, nargs="+", default=[ROOT / "tests"], help="folders tests/ of trees")
    parser.add_argument("--only", default="", help="words that the name has")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    tests = [folder.resolve() for folder in options.tests]
    build_ = prepared(options.work.resolve())
    levels = available_levels(build_.tree)
    for folder in tests:
        failed = None if options.only else found_by(build_.tree, folder, None, None)
        if failed:
            sys.exit(f"mutate_kernels: {folder}: {failed} fails without any mistake")
    chosen = [mutation for mutation in mutations() if options.only in mutation.name]
    missed = sum(not try_one(build_, mutation, tests, levels) for mutation in chosen)
    print(f"{missed} of {len(chosen)} missed")
    sys.exit(missed > 0)


def try_one(build_: Build, mutation: Mutation, tests: Sequence[Path], levels: dict[str, str]) -> bool:
    """Whether the tests of the first tree find a mistake; where they do not, the others are asked."""
    words = f"{mutation.name} [{mutation.level or 'all'}]"
    if mutation.level is not None and mutation.level not in levels:
        print(f"{words}: left out, this machine does not have it", flush=True)
        return True
    level = levels[mutation.level] if mutation.level else None
    with build_.with_mutation(mutation):
        for folder in tests:
            test = found_by(build_.tree, folder, mutation, level)
            print(f"{words}: {test or f'MISSED by {folder}'}", flush=True)
            if test:
                break
    return test is not None and folder == tests[0]


if __name__ == "__main__":
    main()
