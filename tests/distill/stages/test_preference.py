"""DPO by TRL moves a healed model towards what was chosen, and its data is checked first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import quick

from xeco_convert.demo.language import generate_stories
from xeco_convert.errors import OptionError
from xeco_distill.pipeline import heal


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories begun the same way, and ended well (chosen) or by words in disorder (rejected)."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = []
    for story in generate_stories(20, seed=5):
        words = story.split()
        prompt, chosen = " ".join(words[:6]), " " + " ".join(words[6:16])
        records.append({"prompt": prompt, "chosen": chosen, "rejected": " " + " ".join(reversed(words[6:16]))})
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_dpo_learns_what_was_chosen(out: Path, pairs: Path) -> None:
    options = quick(
        stages="kl,dpo",
        preferences=str(pairs),
        budget_tokens=512,
        dpo_learning_rate=2e-3,
        dpo_beta=0.1,
        trainer={"dpo.eval_steps": 3, "dpo.logging_steps": 2},
    )
    report = heal(out, options)
    facts = report.stages["dpo"]
    assert facts["pairs"] == 19 and facts["steps"] == 10
    history = json.loads((out / "xeco_report.json").read_text())["healing"]["stages"]["dpo"]
    assert history["held_out_accuracy"] == facts["held_out_accuracy"] == 1.0
    assert set(report.stages) == {"kl", "dpo"}


def test_without_trl_there_is_one_sentence(out: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(OptionError, match=r"dpo needs TRL: pip install 'xeco-convert\[dpo\]'"):
        heal(out, quick(stages="dpo", preferences=str(pairs)))
