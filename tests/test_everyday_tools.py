"""Tools that people already use, on a converted checkpoint: pipelines, the evaluation harness, uploads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from xeco_convert.modeling import code_files


def test_a_pipeline_writes_text(converted: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(converted))
    found = pipe("w5 w9 w11", max_new_tokens=6, do_sample=False, return_full_text=False)
    assert len(found[0]["generated_text"].split()) <= 6
    assert type(pipe.model).__name__ == "XecoLlamaForCausalLM"


def test_the_evaluation_harness_runs_a_local_task(converted: Path, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": "w5 w9", "choices": ["w7", "w8 w9"], "answer": 1},
        {"text": "w3", "choices": ["w4", "w5"], "answer": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "task.yaml").write_text(
        "task: words\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    model = HFLM(pretrained=str(converted), device="cpu", batch_size=2)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(model, tasks=["words"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= result["results"]["words"]["acc,none"] <= 1
    assert result["n-samples"]["words"]["effective"] == 2


def test_an_upload_carries_everything_that_loads_it_elsewhere(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """push_to_hub with the network's last step replaced: the files that would go."""
    sent: set[str] = set()

    def upload(_self: Any, working_dir: str, _repo_id: str, **_named: Any) -> None:
        sent.update(path.name for path in Path(working_dir).iterdir())

    hub = transformers.utils.hub
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    named = lambda *_arguments, **_named: SimpleNamespace(repo_id="me/model")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", named)
    monkeypatch.setattr(hub.ModelCard, "load", lambda *_arguments, **_named: hub.ModelCard("---\n---\n"))
    AutoModelForCausalLM.from_pretrained(converted).push_to_hub("me/model")
    assert {"config.json", "model.safetensors", *code_files()} <= sent
