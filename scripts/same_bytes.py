"""same_bytes.py REVISION: converts, exports and heals tiny checkpoints of every family with the package of a git revision and
with this tree's, and compares every byte written. For changes that must change nothing.

Both run in plain torch, without the compiled extension. Code files beside the weights are left out: they are the change.
Exits with 1 where a file differs, is missing, or is written by one of the two only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# rows of 64 token ids in an order that does not repeat
TOKENS = [[3 + (row * row + column * (row % 7 + 3)) % 90 for column in range(64)] for row in range(40)]
TEXT = "\n".join(" ".join(f"w{token}" for token in row) for row in TOKENS * 5)
RANK = {"rank": 10, "rope_dim": 4}
# name -> (variant of tests/builders.py, rotary type, its changes, options of the conversion)
_EVERY_FAMILY = (
    "llama_bias",
    "llama_mqa",
    "llama_tied",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3_bias",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3_partial",
    "granite",
    "smollm3",
    "olmo2",
    "gpt_neox",
)
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    **{variant: (variant, "default", RANK) for variant in _EVERY_FAMILY},
    "sampled": ("llama", "default", {**RANK, "calibration": None, "verify": True}),
    "llama3": ("llama", "llama3", {"rank": 16, "q_rank": 12, "latent_norm": True}),
    "yarn": ("qwen2", "yarn", {"kv_size": "40%"}),
    "budget": ("llama", "default", {"kv_size": "25%", "rank_multiple": 4}),
    "budget_nope": ("smollm3", "default", {"kv_size": "50%"}),
    "budget_bytes": (
        "llama",
        "default",
        {"kv_bytes_per_token": 200, "layers": "0,2", "refine": True, "refine_steps": 5},
    ),
    "energy": ("llama", "default", {"energy": 0.8}),
    "energy_ends": ("llama_mha", "default", {"energy": 0.7, "rank": 8, "fixed_ends": True}),
    "refined": ("gemma2", "default", {**RANK, "refine": True, "refine_steps": 5}),
    "regression": ("qwen3", "default", {**RANK, "qk_norm": "regression"}),
    "portable": ("llama", "default", {**RANK, "portable": True}),
    "portable_budget": ("mistral", "default", {"kv_size": "50%", "portable": True}),
    "float16": ("llama", "default", {**RANK, "dtype": "float16", "max_shard_size": "20KB"}),
    "paper": ("llama", "default", {"init": "paper", "rank": 8}),
    "paper_energy": ("qwen2", "default", {"init": "paper", "energy": 0.9, "nope_dim": 4, "q_rank": 16}),
}
EXPORTED = {"portable": ("transformers",), "portable_budget": ("transformers", "vllm", "llama.cpp")}
HEALED = ("llama_bias", "qwen3")


def main(revision: str) -> int:
    """Compare, print what differs, and say how many files are the same."""
    with tempfile.TemporaryDirectory(prefix="xeco-same-") as name:
        folder = Path(name)
        _build_sources(folder / "sources")
        trees = {"before": _archived(revision, folder / "before"), "after": _archived(None, folder / "after")}
        digests = {}
        for side, tree in trees.items():
            outputs = folder / "outputs"  # the same place for both: reports may name it
            _run_tree(tree, folder / "sources", outputs)
            digests[side] = _digests(outputs)
            outputs.rename(folder / f"outputs-{side}")
    before, after = digests["before"], digests["after"]
    different = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    for file in different:
        where = "differs" if file in before and file in after else "before only" if file in before else "after only"
        print(f"{file}: {where}")
    print(
        f"{len(before) - len(different)} of {len(before.keys() | after.keys())} files have the same bytes as at {revision}"
    )
    return 1 if different or not before else 0


def _build_sources(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from builders import build_checkpoint

    for name, (variant, rope, _) in CASES.items():
        build_checkpoint(folder / name, variant, rope, tokenizer=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "tokens.json").write_text(json.dumps(TOKENS), encoding="utf-8")


def _archived(revision: str | None, folder: Path) -> Path:
    """The two packages of a revision, or of the working tree where it is None, without compiled files."""
    folder.mkdir()
    if revision is None:
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "xeco_convert", "distill"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\n")  # fmt: skip
        for file in (file for file in names if file and (ROOT / file).is_file()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes((ROOT / file).read_bytes())
    else:
        archive = subprocess.run(
            ["git", "archive", revision, "xeco_convert", "distill"], cwd=ROOT, check=True, stdout=-1
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    (folder / "distill").rename(folder / "xeco_distill")
    return folder


def _run_tree(tree: Path, sources: Path, outputs: Path) -> None:
    """All cases with the package of this tree, in one process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "XECO_SAME_BYTES": json.dumps([str(sources), str(outputs)]),
    }
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker"]
    subprocess.run(command, env=environment, check=True, cwd=tree)


def worker() -> None:
    """Runs under another tree's package: only what both trees offer is used."""
    import torch

    import xeco_convert
    from xeco_distill.cli import main as distill

    torch.set_num_threads(1)
    sources, outputs = (Path(name) for name in json.loads(os.environ["XECO_SAME_BYTES"]))
    for name, (_, _, options) in CASES.items():
        text = (
            {}
            if options.get("init") == "paper"
            else {"calibration": str(sources / "tokens.json"), "calibration_tokens": 1024}
        )
        xeco_convert.convert(sources / name, outputs / name, **{**text, **options})
        for engine in EXPORTED.get(name, ()):
            _command("export", outputs / name, outputs / f"{name}-{engine}", "--target", engine)
    for name in HEALED:
        healed = outputs / f"{name}-healed"
        arguments = [
            outputs / name,
            "--output",
            healed,
            "--data",
            sources / "text.txt",
            "--budget-tokens",
            1000,
            "--device",
            "cpu",
        ]
        _quietly(distill, [*arguments, "--layer-tokens", 1000, "--layer-steps", 5, "--held-out-tokens", 500])


def _command(*arguments: object) -> None:
    from xeco_convert.cli import main as command

    _quietly(command, list(arguments))


def _quietly(command, arguments) -> None:  # type: ignore[no-untyped-def]
    try:
        command([*(str(argument) for argument in arguments), "--quiet"])
    except SystemExit as end:
        if end.code:
            raise


def _digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".py")
    return {str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest() for file in files}


def _content(file: Path) -> bytes:
    """The bytes of a file; of the report on healing without the times in it."""
    if file.name == "xeco_report.json" and "-healed" in str(file.parent):
        return json.dumps(_without_times(json.loads(file.read_text(encoding="utf-8")))).encode()
    return file.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    if isinstance(value, dict):
        return {
            name: _without_times(item) for name, item in value.items() if not ("second" in name or "minute" in name)
        }
    return value


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        sys.path.pop(0)
        worker()
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(__doc__)
