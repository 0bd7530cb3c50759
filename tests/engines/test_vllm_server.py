"""A converted checkpoint behind vLLM's own OpenAI server, compiled as it is by default, without remote code."""

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
from typing import Any

import pytest
from generation import own_generation
from transformers import AutoTokenizer

import xeco_convert

PROMPT = "once upon a time there was a little girl named lily"
MAX_TOKENS = 40
READY_SECONDS = 900  # torch.compile comes first
# layers 0, 2 and 4 converted and the others kept, so that vLLM's own attention runs beside ours
OPTIONS: dict[str, Any] = {"rank": 48, "rope_dim": 24, "layers": "0,2,4"}


@pytest.fixture(scope="module")
def folder(shared: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("server") / "tinystories-mla"
    xeco_convert.convert(tinystories, output, calibration=str(shared / "text" / "train.txt"), **OPTIONS)
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that answers; it ends with the tests."""
    log, port = tmp_path_factory.mktemp("log") / "server", free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", "tinystories-mla", "--dtype", "float32", "--max-model-len", "512"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"], stdout=output, stderr=output, env={**os.environ, **environment}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not answer (exit code {process.poll()}):\n{log.read_text()[-3000:]}")


def post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "tinystories-mla", "temperature": 0, "max_tokens": MAX_TOKENS, **request}
    call = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=300) as answer:
        return dict(json.load(answer))


def own_text(folder: Path, ids: list[int]) -> str:
    tokens = own_generation(folder, [ids], MAX_TOKENS)[0]["ids"]
    text: str = AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True)
    return text


def test_a_completion_is_the_text_of_the_converted_model(server: str, folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    answer = post(f"{server}/v1/completions", {"prompt": PROMPT, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == MAX_TOKENS
    assert answer["choices"][0]["text"].strip() == own_text(folder, ids).strip()


def test_a_chat_answers_by_the_template_of_the_folder(server: str, folder: Path) -> None:
    messages = [{"role": "user", "content": "tell me a story about a dog"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = post(f"{server}/v1/chat/completions", {"messages": messages, "ignore_eos": True})
    assert answer["choices"][0]["message"]["content"].strip() == own_text(folder, list(ids)).strip()
