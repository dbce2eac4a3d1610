"""GPUs are asked for in another process, as long as this one has not used any: nothing starts their drivers here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from halfstep.hardware import DeviceUnavailableError, accelerators, detect
from halfstep.hardware.accelerators import Accelerator, current_index

H100 = {"name": "H100", "memory_bytes": 80 << 30, "architecture": "9.0", "bf16": True}
V100 = {"name": "V100", "memory_bytes": 32 << 30, "architecture": "7.0", "bf16": False}


@pytest.fixture
def other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """An interpreter that finds two GPUs; returns what CUDA_VISIBLE_DEVICES was, each time that it was started."""
    log, program = tmp_path / "asked", tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"open({str(log)!r}, 'a').write(os.environ.get('CUDA_VISIBLE_DEVICES', '-') + '\\n')\n"
        f"print('a banner of some driver')\nprint({json.dumps(json.dumps([H100, V100]))})\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(accelerators, "_can_be_there", lambda kind: kind == "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    accelerators._asked_apart.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    def refuse(*args: object) -> NoReturn:
        raise AssertionError("this starts the driver")

    for name in ("is_available", "get_device_properties", "current_device", "_lazy_init", "init", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_facts_come_from_another_process_once(other_process: Callable[[], list[str]]) -> None:
    facts = detect()
    assert (facts.type, facts.name, facts.memory_bytes) == ("cuda", "H100", 80 << 30)
    assert "compute capability 9.0" in facts.detail and facts.formats["bf16"].support == "native"
    assert detect("cuda") == detect("cuda:0") == detect(torch.device("cuda", 0)) == facts
    assert other_process() == ["-"]


def test_each_gpu_has_its_own_facts(other_process: Callable[[], list[str]]) -> None:
    second = detect("cuda:1")
    assert (second.name, second.formats["bf16"].support) == ("V100", "emulated")
    with pytest.raises(DeviceUnavailableError, match="no device cuda:2: PyTorch finds 2"):
        detect("cuda:2")
    with pytest.raises(DeviceUnavailableError, match="unknown device 'cuda:x'"):
        detect("cuda:x")


def test_what_is_visible_is_asked_again_when_it_changes(
    other_process: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    detect("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    detect("cuda")
    detect("cuda")
    assert other_process() == ["-", "1"]


def test_a_process_that_uses_its_gpu_is_asked_itself(
    other_process: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def properties(index: int) -> Any:
        name = ("A100", "T4")[index]
        return SimpleNamespace(name=name, total_memory=40 << 30, major=8 - index, minor=5 * index)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert current_index("cuda") == 1
    assert [detect(device).name for device in ("cuda", "cuda:0", "cuda:1")] == ["T4", "A100", "T4"]
    assert detect("cuda").formats["bf16"].support == "emulated"
    assert other_process() == []


def test_without_another_process_this_one_is_asked(
    other_process: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerators.accelerators("cuda") == ()


def test_the_program_itself_says_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "_can_be_there", lambda kind: True)
    accelerators._asked_apart.cache_clear()
    here = accelerators._asked_here("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert accelerators.accelerators("cuda") == here
    assert all(isinstance(device, Accelerator) for device in here)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_both_processes_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.cuda.init()
    here = accelerators.accelerators("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    accelerators._asked_apart.cache_clear()
    assert accelerators.accelerators("cuda") == here and len(here) == torch.cuda.device_count()
