"""``halfstep run`` on the device itself: a script under a policy equals the script written with PyTorch's autocast."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfstep
from halfstep import record

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

#: A plain script; `LOWERED` is what the second version puts around its forward pass.
SCRIPT = """
import sys
import torch
from contextlib import nullcontext
from torch import nn

device = sys.argv[1]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(6):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator).to(device)
    y = torch.randint(8, (16,), generator=generator).to(device)
    with LOWERED:
        loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("LOSS", loss.item())
print("NORM", sum(p.double().square().sum().item() for p in model.parameters()), model[0].weight.device.type)
"""
UNDER_HALFSTEP = ("-m", "halfstep", "run", "--no-record", "--quiet")


def run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(halfstep.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(output: str) -> list[str]:
    return re.findall(r"^(?:LOSS|NORM|SAID) .*$", output, re.MULTILINE)


@on_devices
def test_an_unmodified_script_equals_the_one_written_with_autocast(device: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(SCRIPT.replace("LOWERED", "nullcontext()"))
    (tmp_path / "by_hand.py").write_text(SCRIPT.replace("LOWERED", "torch.autocast(device, torch.bfloat16)"))
    expected = told(run("by_hand.py", device, folder=tmp_path))
    asked = f"-m halfstep run --quiet --policy bf16-mixed --device {device} --record run.jsonl plain.py {device}"
    found = told(run(*asked.split(), folder=tmp_path))
    assert found == expected and len(found) == 7 and found[-1].endswith(device)
    written = record.read(tmp_path / "run.jsonl")
    assert [step.applied for step in written.steps] == [True] * 6
    assert written.header.environment["device_type"] == device


@on_devices
@pytest.mark.parametrize("policy", ["fp32", "bf16-master", "fp16-mixed"])
def test_a_script_trains_under_every_kind_of_policy(policy: str, device: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(SCRIPT.replace("LOWERED", "nullcontext()"))
    plain = told(run("plain.py", device, folder=tmp_path))
    asked = ("--policy", policy, "--device", device, "plain.py", device)
    found = told(run(*UNDER_HALFSTEP, *asked, folder=tmp_path))
    losses = [[float(line.split()[1]) for line in lines if line.startswith("LOSS")] for lines in (plain, found)]
    assert len(losses[1]) == 6 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02
    assert (losses[0] == losses[1]) or policy != "fp32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_script_that_chooses_its_gpus_by_the_environment_is_heard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import torch\n"
        "print('SAID', torch.cuda.is_available(), torch.cuda.device_count())\n"
    )
    alone = told(run("script.py", folder=tmp_path))
    assert told(run(*UNDER_HALFSTEP, "script.py", folder=tmp_path)) == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_script_may_fork_workers_that_use_the_device(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "import torch\n"
        "def work(queue):\n"
        "    try:\n"
        "        queue.put(torch.ones(2, device='cuda').sum().item())\n"
        "    except Exception as error:\n"
        "        queue.put(type(error).__name__)\n"
        "context = multiprocessing.get_context('fork')\n"
        "queue = context.Queue()\n"
        "worker = context.Process(target=work, args=(queue,))\n"
        "worker.start()\n"
        "print('SAID', queue.get(timeout=60))\n"
        "worker.join()\n"
    )
    alone = told(run("script.py", folder=tmp_path))
    assert told(run(*UNDER_HALFSTEP, "script.py", folder=tmp_path)) == alone
