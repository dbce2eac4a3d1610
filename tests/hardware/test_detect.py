"""Device facts: a table of known GPUs, CPU features one by one, and what is written down about a machine."""

from __future__ import annotations

import getpass
import itertools
import json
import platform
from pathlib import Path

import psutil
import pytest
import torch

from halfstep.hardware import (
    DEVICE_TYPES,
    DeviceUnavailableError,
    cpu_flags,
    cpu_formats,
    cuda_formats,
    detect,
    environment,
    product_rates,
)
from halfstep.hardware.detect import NATIVE_FROM

# Tensor-core formats of NVIDIA GPUs, from the architecture white papers.
CUDA = {
    (6, 0): {"tf32": "missing", "bf16": "emulated", "fp16": "slow", "fp8": "missing"},  # P100
    (7, 0): {"tf32": "missing", "bf16": "emulated", "fp16": "native", "fp8": "missing"},  # V100
    (7, 5): {"tf32": "missing", "bf16": "emulated", "fp16": "native", "fp8": "missing"},  # T4, RTX 20
    (8, 0): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "missing"},  # A100
    (8, 6): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "missing"},  # RTX 30 has bf16
    (8, 9): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "native"},  # RTX 40, L4
    (9, 0): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "native"},  # H100
    (10, 0): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "native"},  # B200
    (12, 0): {"tf32": "native", "bf16": "native", "fp16": "native", "fp8": "native"},  # RTX 50
}


@pytest.mark.parametrize("capability", CUDA)
def test_cuda_formats_are_those_of_the_architecture(capability: tuple[int, int]) -> None:
    formats = cuda_formats(capability)
    assert {name: f.support for name, f in formats.items()} == {"fp32": "native", **CUDA[capability]}
    assert all(f"compute capability {capability[0]}.{capability[1]}" in f.because for f in formats.values())


FEATURES = ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16")


@pytest.mark.parametrize("features", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("bf16", [None, 0.3, 1.05, 4.0])
@pytest.mark.parametrize("fp16", [None, 0.02, 1.05, 4.0])
def test_a_cpu_format_is_native_where_its_products_are_faster_and_says_by_what(
    features: tuple[bool, ...], bf16: float | None, fp16: float | None
) -> None:
    there = dict(zip(FEATURES, features, strict=True))
    formats = cpu_formats(there, {"bf16": bf16, "fp16": fp16})
    assert formats["fp32"].support == "native"
    assert formats["tf32"].support == formats["fp8"].support == "missing"
    for name, rate in (("bf16", bf16), ("fp16", fp16)):
        support, because = formats[name].support, formats[name].because
        own = [feature for feature in FEATURES if feature.endswith(name) and there[feature]]
        if rate is None:
            assert support == "missing"
            continue
        assert (support == "native") == (rate > 1.2)
        assert f"products at {rate:.2g}".rstrip("0").rstrip(".") in because and "measured" in because
        if own:
            assert because.split(":")[0] in own and support in ("native", "slow")
        elif rate < 1.2:
            assert "neither" in because and support == ("slow" if rate < 0.1 else "emulated")


def test_this_cpu_agrees_with_pytorchs_own_query() -> None:
    """What is native has been measured; and no kernel is faster than FP32's without an instruction for it."""
    facts, rates = detect("cpu"), product_rates()
    for name in ("bf16", "fp16"):
        rate = rates[name]
        assert (facts.formats[name].support == "native") == (rate is not None and rate >= NATIVE_FROM)
    if platform.machine() in ("x86_64", "AMD64") and facts.formats["bf16"].support == "native":
        assert torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert facts.type == "cpu"
    assert facts.memory_bytes == psutil.virtual_memory().total
    capabilities = torch.cpu.get_capabilities()
    assert all(capabilities[flag] is True for flag in cpu_flags())


def test_detect_without_a_wish_takes_an_accelerator_if_there_is_one() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert detect().type == (accelerator.type if accelerator is not None else "cpu")


@pytest.mark.parametrize("device", [d for d in DEVICE_TYPES if d != "cpu"])
def test_an_absent_device_is_named_with_what_is_there(device: str) -> None:
    if getattr(torch, device).is_available():
        assert detect(device).type == device
        return
    with pytest.raises(DeviceUnavailableError, match=rf"no {device} device: .*; this machine has: cpu"):
        detect(device)


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="needs a CPU build")
def test_a_cpu_build_of_pytorch_is_named_as_the_reason() -> None:
    with pytest.raises(DeviceUnavailableError, match="was built without CUDA"):
        detect("cuda")


def test_an_unknown_device_lists_the_known() -> None:
    with pytest.raises(DeviceUnavailableError, match="unknown device 'tpu'; known: cpu, cuda, mps, xpu"):
        detect("tpu")


def test_the_environment_is_json_and_names_nobody() -> None:
    found = environment(detect("cpu"))
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert found["torch"] == torch.__version__ and found["device_type"] == "cpu"
    private = [str(Path.home()), str(Path.cwd()), platform.node()]
    # A user or host called "cpu" would be found by chance: look for whole JSON strings and path parts.
    words = text.replace("/", '"').split('"')
    assert getpass.getuser() not in words
    assert not any(len(item) > 1 and item in words for item in private)
    assert "/" not in text.replace("Unix/", "")
