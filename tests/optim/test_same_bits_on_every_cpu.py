"""Ten thousand steps of the compiled kernels end in the same bits on every CPU.

The kernels have loops for AVX-512, AVX2 and none of these, and pick at run time. Replicas on mixed machines, and a run
that goes on elsewhere, must not part: so the results stand here as constants, the same from the AVX-512 loops and from
builds for x86-64-v3 and for any processor. The numbers that go in are made of integers, because even torch's random
generators differ between vector widths.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_cases import same_bits
from torch import Tensor

from halfstep import optim
from halfstep.optim.backends import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "-")

STEPS = 10_000
SHAPE = (60, 70)  # enough for 8-bit state; rows that end in a part of a group of 64

ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9}
LION: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
CASES: dict[str, tuple[type[Any], torch.dtype, dict[str, Any]]] = {
    "adamw fp32": (optim.AdamW, torch.float32, ADAMW),
    "adamw bf16 exact": (optim.AdamW, torch.bfloat16, ADAMW),
    "adamw bf16 fp32": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "fp32"}),
    "adamw bf16 24bit": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "24bit"}),
    "adamw bf16 24bit, state bf16": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "24bit", "state": "bf16"}),
    "adamw bf16 alone": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "none", "rounding": "stochastic"}),
    "adamw bf16 kahan": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "none", "rounding": "kahan"}),
    "adamw fp16 exact": (optim.AdamW, torch.float16, ADAMW),
    "adamw fp16 24bit": (optim.AdamW, torch.float16, {**ADAMW, "master": "24bit"}),
    "adamw fp16 exact, state 8bit": (optim.AdamW, torch.float16, {**ADAMW, "state": "8bit"}),
    "adamw fp32, state 8bit": (optim.AdamW, torch.float32, {**ADAMW, "state": "8bit"}),
    "adamw bf16 exact, state 8bit": (optim.AdamW, torch.bfloat16, {**ADAMW, "state": "8bit"}),
    "adamw bf16 24bit, state 8bit": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "24bit", "state": "8bit"}),
    "adamw bf16 24bit stochastic, state 8bit": (
        optim.AdamW,
        torch.bfloat16,
        {**ADAMW, "master": "24bit", "rounding": "stochastic", "state": "8bit"},
    ),
    "adamw bf16 alone, state 8bit": (optim.AdamW, torch.bfloat16, {**ADAMW, "master": "none", "state": "8bit"}),
    "adam amsgrad": (optim.Adam, torch.bfloat16, {"lr": 1e-3, "amsgrad": True, "weight_decay": 0.01}),
    "sgd bf16 exact": (optim.SGD, torch.bfloat16, SGD),
    "sgd bf16 24bit, state 8bit": (optim.SGD, torch.bfloat16, {**SGD, "master": "24bit", "state": "8bit"}),
    "lion bf16 exact": (optim.Lion, torch.bfloat16, LION),
    "lion bf16 exact, state 8bit": (optim.Lion, torch.bfloat16, {**LION, "state": "8bit"}),
}
RESULTS = {
    "adamw fp32": "78bfb0b72639b635",
    "adamw bf16 exact": "33885a50fea7cf55",
    "adamw bf16 fp32": "41f1a70ed0637592",
    "adamw bf16 24bit": "ae1f6f690c1d199f",
    "adamw bf16 24bit, state bf16": "12657ba6be0bf31b",
    "adamw bf16 alone": "f6ce40c78771888f",
    "adamw bf16 kahan": "0638cc3bb7003ad9",
    "adamw fp16 exact": "0c0d6bd9cdb771de",
    "adamw fp16 24bit": "5c61f27c714aa326",
    "adamw fp16 exact, state 8bit": "0d6b8ea0e506fd36",
    "adamw fp32, state 8bit": "36662fc21c40de0d",
    "adamw bf16 exact, state 8bit": "19a101307f290d1b",
    "adamw bf16 24bit, state 8bit": "be5b69336e4e488d",
    "adamw bf16 24bit stochastic, state 8bit": "70090b941be4eb46",
    "adamw bf16 alone, state 8bit": "b139133f42d2a3a3",
    "adam amsgrad": "59f2105e9256b0d5",
    "sgd bf16 exact": "61ba1f5f50364997",
    "sgd bf16 24bit, state 8bit": "78396ba757ac6431",
    "lion bf16 exact": "004b129a82871d0b",
    "lion bf16 exact, state 8bit": "3fff891e1afab5a0",
}


def numbers(seed: int) -> Tensor:
    """Between -1 and 1, of very different sizes: FP32 quotients of integers, so the same everywhere."""
    index = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int64) + 1000 * seed
    mixed = (index * 2654435761 + 12345) % 2**32
    size = 2.0 ** -(mixed % 13).to(torch.float32)
    return ((mixed >> 8) % 20001 - 10000).to(torch.float32).div(10000).mul(size).reshape(SHAPE)


def checksum(case: str) -> str:
    """Of the weights, and of all that the optimizer keeps, after `STEPS` steps."""
    kind, dtype, options = CASES[case]
    weight = torch.nn.Parameter(numbers(99).to(dtype))
    optimizer = kind([weight], backend="native", seed=7, **options)
    gradients = [numbers(seed).to(dtype) for seed in range(16)]
    for step in range(STEPS):
        weight.grad = gradients[step % 16]
        optimizer.step()
    kept = [value for _, value in sorted(optimizer.state[weight].items()) if isinstance(value, Tensor)]
    digest = hashlib.sha256()
    for tensor in (weight.detach(), *kept):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels built for any processor, without the loops that are written for AVX-512."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("kernels") / "portable.so"
    sources = sorted(str(path) for path in (Path(native.__file__).parent / "kernels").glob("*.c"))
    flags = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-DHS_PORTABLE"]
    subprocess.run([compiler, *flags, *sources, "-lm", "-o", str(library)], check=True)
    opened = native._open(library)
    assert not isinstance(opened, str), opened
    return opened


@pytest.mark.parametrize("special", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("case", CASES)
def test_a_build_for_any_processor_leaves_the_same_groups_to_the_general_loop(
    case: str, special: float, portable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of every size, and now and then one that is ``special``; weights that somebody sets to 0."""
    kind, dtype, options = CASES[case]

    def run() -> list[Tensor]:
        weight = torch.nn.Parameter(numbers(99).to(dtype))
        optimizer = kind([weight], backend="native", seed=7, **options)
        for step in range(24):
            weight.grad = (numbers(step) * 2.0 ** -(40 * (step % 3))).to(dtype)
            if step % 5 == 3:
                weight.grad.view(-1)[::977] = torch.tensor(special).to(dtype)  # 1e30 is inf in fp16
            if step % 7 == 4:
                weight.data[::3] = 0
            optimizer.step()
        return [weight.detach(), *(value for _, value in sorted(optimizer.state[weight].items()))]

    expected = run()
    monkeypatch.setattr(native, "_library", lambda: portable)
    assert all(map(same_bits, run(), expected))


@pytest.mark.parametrize("case", CASES)
def test_the_bits_after_ten_thousand_steps(case: str) -> None:
    assert checksum(case) == RESULTS[case]
