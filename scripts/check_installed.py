"""Checks an installed xeco-convert: run it by the Python of the environment, outside of the source tree, with -I.

The demo runs with every attention on the compiled kernels, which must come from that environment; then each op is compared
with its reference at every instruction set of this processor, and must be no further from it than its dtype allows.
"""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
import warnings
from pathlib import Path

os.environ["XECO_ATTENTION"] = "fused"
# several times the largest error seen here (2e-7, 2e-3): a wrong kernel is off by about 1
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


def main() -> None:
    """Raises or exits with a sentence where anything is wrong."""
    site = Path(sysconfig.get_paths()["platlib"]).resolve()
    run_demo()
    module = sys.modules.get("xeco_convert._C")
    if module is None:
        sys.exit("the demo never imported xeco_convert._C")
    if site not in Path(module.__file__ or "").resolve().parents:
        sys.exit(f"xeco_convert._C: expected from {site}, found {module.__file__}")
    print(f"\nxeco_convert._C {module.version} from {module.__file__}")
    print(f"compiled: {', '.join(module.compiled_levels)}; found: {module.detected_level}")
    levels = module.cpu_levels
    for level in levels[: levels.index(module.detected_level) + 1]:
        module.set_cpu_level(level)
        check_ops(level)
    print("installed package: all well")


def run_demo() -> None:
    """`python -m xeco_convert.demo`, where a missing extension's warning is an error."""
    sys.argv = ["xeco_convert.demo", "--output", "demo-output"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*extension.*")
        try:
            runpy.run_module("xeco_convert.demo", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                sys.exit(f"the demo ended with {end.code}")


def check_ops(level: str) -> None:
    """Forward, backward and decode against float64, awkward sizes."""
    import torch

    from xeco_convert.ops import latent_attention, latent_attention_decode

    for name, bound in BOUNDS.items():
        generator = torch.Generator().manual_seed(0)
        sizes = ((2, 5, 7, 48), (2, 5, 7, 16), (2, 133, 48), (2, 133, 16))
        exact = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        exact = [tensor.to(getattr(torch, name)).double().requires_grad_() for tensor in exact]
        fast = [tensor.detach().to(getattr(torch, name)).requires_grad_() for tensor in exact]
        outputs = []
        for tensors in (exact, fast):
            out, _ = latent_attention(*tensors, softmax_scale=0.125)
            out.double().square().sum().backward()
            with torch.no_grad():
                decoded, _ = latent_attention_decode(*tensors, softmax_scale=0.125)
            outputs.append([out.detach(), *(tensor.grad for tensor in tensors), decoded])
        for expected, result in zip(*outputs, strict=True):
            error = ((result.double() - expected).norm() / expected.norm()).item()
            if not error < bound:
                sys.exit(f"{level}, {name}: relative error {error:.1e}, expected below {bound:.0e}")
    print(f"{level}: forward, backward and decode agree with float64")


main()
