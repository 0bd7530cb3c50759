"""Tools that people already use, on a converted checkpoint: pipelines, fine-tuning, the evaluation harness, quantised caches,
serving, uploads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from builders import random_ids
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, cache_utils

from xeco_convert.export import export_checkpoint
from xeco_convert.modeling import code_files


def test_a_pipeline_writes_text(converted: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(converted))
    found = pipe("w5 w9 w11", max_new_tokens=6, do_sample=False, return_full_text=False)
    assert len(found[0]["generated_text"].split()) <= 6
    assert type(pipe.model).__name__ == "XecoLlamaForCausalLM"


def test_trl_fine_tunes_every_weight(converted: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(converted)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"text": "w5 w9 w11 w4 w7"}, {"text": "w3 w8 w6"}])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows)
    assert 0 < trainer.train().training_loss < 20
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert same == []


@torch.no_grad()
@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no cache in 8-bit floats"
)
def test_an_eight_bit_cache_holds_latents(converted: Path) -> None:
    """transformers' fp8 cache: one byte for each of rank + rope dim numbers, and a scale for each tensor."""
    model, ids = AutoModelForCausalLM.from_pretrained(converted).eval(), random_ids(2, 20)
    logits = {}
    caches = {"plain": DynamicCache(config=model.config), "fp8": QuantizedCache("fp8", model.config)}
    for name, cache in caches.items():
        steps = [model(part, past_key_values=cache).logits for part in (ids[:, :8], *ids[:, 8:].split(1, dim=1))]
        logits[name] = torch.cat(steps, dim=1)
    for layer in caches["fp8"].layers:
        numbers = [tensor for tensor, _scale in (layer._quantized_keys, layer._quantized_values)]
        assert sum(tensor.nbytes for tensor in numbers) == 2 * 20 * (12 + 4)
    error = (logits["fp8"] - logits["plain"]).norm() / logits["plain"].norm()
    assert 0 < error < 0.1  # 0.02 to 0.06 was observed
    text = model.generate(
        ids, max_new_tokens=4, do_sample=False, cache_implementation="quantized", cache_config={"backend": "fp8"}
    )
    assert text.shape[0] == 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answer(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a server on this machine, past any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
        found: dict[str, Any] = json.loads(response.read())
    return found


@pytest.fixture
def server(converted: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """`transformers serve` with an export of a converted checkpoint: address and folder."""
    export_checkpoint(converted, tmp_path / "stock")
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tmp_path / "stock")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(2000):
            try:
                assert answer(f"http://127.0.0.1:{port}/health") == {"status": "ok"}
                break
            except urllib.error.URLError:
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", tmp_path / "stock"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_transformers_serve_completes_and_chats(server: tuple[str, Path]) -> None:
    address, folder = server
    settings = {"model": str(folder), "max_tokens": 4, "temperature": 0}
    found = answer(f"{address}/v1/completions", {**settings, "prompt": "w5 w9 w11"})
    assert found["usage"]["prompt_tokens"] == 3 and found["usage"]["completion_tokens"] <= 4
    message = {"role": "user", "content": "w5 w9 w11"}
    chat = answer(f"{address}/v1/chat/completions", {**settings, "messages": [message]})
    assert chat["choices"][0]["message"]["content"] == found["choices"][0]["text"]


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
