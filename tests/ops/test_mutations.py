"""The mistakes that scripts/mutate_kernels.py makes are still mistakes of this tree: each text occurs as often as it should."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "mutate_kernels.py"))
MUTATIONS = SCRIPT["mutations"]()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_is_changed_is_there(mutation: Any) -> None:
    files = mutation.files(ROOT)
    assert files and mutation.new != mutation.old
    texts = [file.read_text("utf-8") for file in files]
    assert all(mutation.pattern().sub(lambda _: mutation.new, text) != text for text in texts)
    assert all((ROOT / "tests" / "ops" / name).is_file() for name in mutation.tests)


def test_names_are_unique_and_there_are_enough() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 20


def test_mistakes_are_made_in_code_of_one_level_where_they_name_it() -> None:
    levels = {SCRIPT["level_of"](file) for file in (ROOT / "csrc").rglob("*.cpp")}
    assert {mutation.level for mutation in MUTATIONS} <= levels


def test_a_text_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text("int a = 1;\nint b =\n    1;\n")
    make = SCRIPT["Mutation"]
    with pytest.raises(ValueError, match="'c': expected 1 times in csrc and ops, found 0"):
        make(name="c", old="int c = 1;", new="").files(tmp_path)
    assert make(name="b", old="int b = 1;", new="").files(tmp_path) == [tmp_path / "csrc" / "one.cpp"]
