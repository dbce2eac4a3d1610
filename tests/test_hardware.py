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
)

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


@pytest.mark.parametrize(
    "features",
    [
        dict(zip(("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16"), bits, strict=True))
        for bits in itertools.product([False, True], repeat=4)
    ],
)
def test_a_cpu_format_is_native_only_with_its_instructions(features: dict[str, bool]) -> None:
    formats = cpu_formats({"architecture": "x86_64", "cpu_name": "some CPU", **features})
    has_bf16 = features["avx512_bf16"] or features["amx_bf16"]
    has_fp16 = features["avx512_fp16"] or features["amx_fp16"]
    assert formats["fp32"].support == "native"
    assert formats["bf16"].support == ("native" if has_bf16 else "emulated")
    assert formats["fp16"].support == ("native" if has_fp16 else "slow")
    assert formats["tf32"].support == formats["fp8"].support == "missing"
    if has_bf16:
        assert features[formats["bf16"].because]
    if has_fp16:
        assert features[formats["fp16"].because]


def test_an_arm_cpu_is_not_judged_by_x86_measurements() -> None:
    formats = cpu_formats({"architecture": "aarch64", "neon": True, "bf16": True})
    assert formats["bf16"].support == "native"
    assert formats["fp16"].support == "unknown"
    assert cpu_formats({"architecture": "aarch64", "bf16": False})["bf16"].support == "emulated"


def test_this_cpu_agrees_with_pytorchs_own_query() -> None:
    facts = detect("cpu")
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if platform.machine() in ("x86_64", "AMD64"):
        assert (facts.formats["bf16"].support == "native") == native
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
