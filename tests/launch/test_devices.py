"""Where a script's modules are: known when it calls them, and nothing of CUDA is started before it does."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep import hardware
from halfstep.hardware import DeviceFacts, DeviceUnavailableError, accelerators, cuda_formats
from halfstep.hardware.accelerators import Accelerator
from halfstep.launch import run_under_policy
from halfstep.launch.session import Session
from halfstep.policy import POLICIES

#: What starts the driver or CUDA: after any of these a script's CUDA_VISIBLE_DEVICES comes too late.
STARTING = ("is_available", "get_device_properties", "current_device", "_lazy_init", "init", "synchronize")


@pytest.mark.parametrize("policy", ["fp32", "auto", "bf16-mixed", "fp16-mixed"])
def test_nothing_of_cuda_is_started_before_a_scripts_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    calls: list[str] = []
    for name in STARTING:
        original = getattr(torch.cuda, name)
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, name=name, original=original: calls.append(name) or original(*args)
        )
    monkeypatch.setattr(accelerators, "_can_be_there", lambda kind: kind == "cuda")
    h100 = Accelerator("H100", 80 << 30, "9.0", True)
    monkeypatch.setattr(accelerators, "_asked_apart", lambda kind, visibility: (h100,))
    monkeypatch.setattr(builtins, "CALLS", calls, raising=False)
    script = tmp_path / "script.py"
    script.write_text("import builtins\nbuiltins.CALLS.append('first line')\n")
    run_under_policy(script, [], policy, record=tmp_path / "record.jsonl", seed=1)
    assert calls == ["first line"]


def facts(name: str, capability: tuple[int, int]) -> DeviceFacts:
    return DeviceFacts("cuda", name, 80 << 30, cuda_formats(capability), f"compute capability {capability}")


GPUS = {"cuda:0": facts("H100", (9, 0)), "cuda:1": facts("V100", (7, 0)), "cuda:2": facts("H100", (9, 0))}


def session(monkeypatch: pytest.MonkeyPatch, requested: str, policy: str = "bf16-mixed") -> tuple[Session, list[Any]]:
    detect = hardware.detect

    def found(device: Any) -> DeviceFacts:
        if str(device) == "cuda:9":
            raise DeviceUnavailableError("no such device")
        return GPUS[str(device)] if str(device) in GPUS else detect(device)

    monkeypatch.setattr(hardware, "detect", found)
    told: list[Any] = []
    made = Session(requested, POLICIES[policy], "cuda", told.append)
    made.devices.expected = "H100"
    return made, told


def test_another_gpu_than_the_first_gets_its_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = session(monkeypatch, "auto")
    made.devices.met(torch.device("cuda:1"))
    assert (str(made.policy), made.device_type, made.devices.current) == ("fp16-mixed", "cuda", torch.device("cuda:1"))
    assert [notice.code for notice in told] == ["other-device", "policy-changed"]
    assert "the model is on V100 (cuda:1), not on the H100 of the header" in told[0].message
    assert "the model is on cuda:1, not on H100: policy fp16-mixed instead of bf16-mixed" in told[1].message


@pytest.mark.parametrize("device", ["cuda:0", "cuda:2", "cuda:9"])
def test_where_nothing_differs_nothing_is_said(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    made, told = session(monkeypatch, "auto")
    made.devices.met(torch.device(device))
    assert (str(made.policy), told, made.devices.current) == ("bf16-mixed", [], torch.device(device))


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = session(monkeypatch, "fp16-mixed", "fp16-mixed")
    made.devices.met(torch.device("cpu"))
    assert (str(made.policy), made.device_type, told) == ("fp16-mixed", "cpu", [])
    made.devices.met(torch.device("cuda:1"))
    made.devices.met(torch.device("cpu"))
    assert (made.device_type, made.devices.current) == ("cpu", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_script_may_hide_it_and_fork(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import os
if (child := os.fork()) == 0:
    import torch
    os._exit(int(torch.ones(2, device="cuda").sum().item()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
assert not torch.cuda.is_available()
"""
    )
    command = [sys.executable, "-m", "halfstep", "run", "--no-record", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
