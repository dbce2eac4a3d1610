"""What a script sees of its surroundings, and what is left when it is over."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from halfstep import record
from halfstep.launch import ScriptError, run_under_policy

TRAIN = """
    import torch
    from torch import nn
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for _ in range(4):
        net(torch.ones(1, 2)).sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
"""


def halfstep(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.run(
        [sys.executable, "-m", "halfstep", "run", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, **environment},
        timeout=120,
    )


def entry_points() -> dict[str, object]:
    import random

    import numpy

    owners = {
        "call": (torch.nn.Module, "__call__"),
        "backward": (torch.autograd, "backward"),
        "prepare": (torch.optim.Optimizer, "_patch_step_function"),
        "add": (torch.optim.Optimizer, "add_param_group"),
        "load": (torch.optim.Optimizer, "load_state_dict"),
        "state": (torch.optim.Optimizer, "state_dict"),
        "autocast": (torch.autocast, "__enter__"),
        "scale": (torch.amp.GradScaler, "scale"),
        "scaler step": (torch.amp.GradScaler, "step"),
        "clip": (torch.nn.utils, "clip_grad_norm_"),
        "clip too": (torch.nn.utils.clip_grad, "clip_grad_norm_"),
        "scheduler": (LRScheduler, "step"),
        "one cycle": (OneCycleLR, "step"),
        "cosine": (CosineAnnealingLR, "step"),
        "seed": (torch, "manual_seed"),
        "random": (random, "seed"),
        "numpy": (numpy.random, "seed"),
    }
    return {name: getattr(owner, attribute) for name, (owner, attribute) in owners.items()}


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master"])
@pytest.mark.parametrize("ending", ["", "raise ValueError('planted')", "import sys; sys.exit(4)"])
def test_everything_is_put_back(launch, policy, ending):
    torch.optim.SGD([torch.zeros(1)])  # PyTorch wraps each optimizer class at its first use; have that behind us
    before, step = entry_points(), torch.optim.SGD.step
    modules, argv, path = sys.modules["__main__"], sys.argv, list(sys.path)
    ran = launch(TRAIN + "\n    " + ending, policy, seed=1)
    assert ran.run.steps == 4
    assert entry_points() == before
    assert torch.optim.SGD.step is step
    assert (sys.modules["__main__"], sys.argv, sys.path) == (modules, argv, path)
    net = torch.nn.Linear(2, 1)
    assert net(torch.ones(1, 2)).dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


def test_surroundings_are_those_of_plain_python(tmp_path):
    script = tmp_path / "deep" / "show.py"
    script.parent.mkdir()
    (script.parent / "neighbour.py").write_text("value = 42")
    script.write_text(
        "import os, sys, pickle, neighbour\n"
        "class Thing: pass\n"
        "pickle.loads(pickle.dumps(Thing()))\n"
        "print(sys.argv, __name__, __file__, os.getcwd(), neighbour.value, sys.path[0], __builtins__.__name__)\n"
        "print(sys.modules['__main__'].Thing is Thing)\n"
    )
    arguments = ["--policy", "x", "--", "-v", "a b"]
    plain = subprocess.run(
        [sys.executable, "deep/show.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ours = halfstep("--no-record", "deep/show.py", *arguments, cwd=tmp_path)
    assert ours.stdout == plain.stdout
    assert ours.returncode == 0


@pytest.mark.parametrize(
    "ending",
    [
        "raise KeyError('planted')",
        "import sys; sys.exit(7)",
        "import sys; sys.exit('sorry')",
        "1 / 0",
        "exit()",
    ],
)
def test_exit_code_and_traceback_are_those_of_plain_python(tmp_path, ending):
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n"
        f"        {ending}\n"
        "net = Net()\n"
        "torch.optim.SGD(net.parameters(), 0.1)\n"
        "net(torch.ones(1))\n"
    )
    plain = subprocess.run([sys.executable, "fails.py"], cwd=tmp_path, capture_output=True, text=True)
    ours = halfstep("--quiet", "--no-record", "--policy", "bf16-mixed", "fails.py", cwd=tmp_path)
    assert ours.returncode == plain.returncode
    assert ours.stderr == plain.stderr


def test_record_of_a_failing_run_is_whole(launch):
    ran = launch(TRAIN + "\n    raise ValueError('planted')", "fp16-mixed")
    assert ran.run.exit_code == 1
    assert ran.record.end is not None
    assert ran.record.end.outcome == "error" and ran.record.end.error == "ValueError: planted"
    assert len(ran.record.steps) == 4 and not ran.record.truncated


def test_killed_run_leaves_a_readable_record(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(TRAIN) + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    ours = halfstep("--record", "r.jsonl", "killed.py", cwd=tmp_path)
    assert ours.returncode == -9
    left = record.read(tmp_path / "r.jsonl")
    assert len(left.steps) == 4 and left.end is None and left.memory is not None


def test_interrupted_run_closes_its_record(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(TRAIN) + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ours = halfstep("--record", "r.jsonl", "interrupted.py", cwd=tmp_path)
    assert ours.returncode == 130
    assert "KeyboardInterrupt" in ours.stderr
    left = record.read(tmp_path / "r.jsonl")
    assert left.end is not None and left.end.outcome == "interrupted"


def test_step_limit_ends_the_script_even_past_a_broad_except(launch):
    ran = launch(
        """
        import torch
        net = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        while True:
            try:
                net(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            except Exception:
                pass
        """,
        "fp32",
        step_limit=5,
    )
    assert ran.run.outcome == "step limit" and ran.run.exit_code == 0
    assert [s.step for s in ran.record.steps] == [1, 2, 3, 4, 5]


def test_seed_index_shifts_the_scripts_own_seeds_and_zero_does_not(launch):
    source = """
        import random, numpy, torch
        a = torch.rand(1).item(), random.random(), numpy.random.rand()
        torch.manual_seed(5); random.seed(5); numpy.random.seed(5)
        b = torch.rand(1).item(), random.random(), float(numpy.random.rand())
        b += (float(numpy.random.default_rng(5).random()),)
        torch.save({"unseeded": a[:2], "seeded": b}, "out.pt")
    """
    plain = launch(source, "fp32").out
    zero, one, again = (launch(source, "fp32", seed=seed).out for seed in (0, 1, 1))
    assert zero["seeded"] == plain["seeded"]
    assert one == again
    assert not set(one["seeded"]) & set(zero["seeded"]) and one["unseeded"] != zero["unseeded"]


def test_data_loader_workers_do_not_write_into_the_record(launch):
    ran = launch(
        """
        import torch
        from torch import nn
        class Data(torch.utils.data.Dataset):
            def __init__(self):
                self.net = nn.Linear(2, 2)
            def __len__(self):
                return 8
            def __getitem__(self, i):      # trains something in the worker, of all things
                net = nn.Linear(2, 2)
                optimizer = torch.optim.SGD(net.parameters(), 0.1)
                net(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                return self.net(torch.ones(2)).detach()
        torch.set_num_threads(1)
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x in torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=1):
            net(x).sum().backward()
            optimizer.step()
        """,
        "bf16-mixed",
    )
    assert ran.run.exit_code == 0
    assert [s.step for s in ran.record.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no script .*missing\.py"),
        ("def f(:\n  pass\n", r"missing\.py:1: SyntaxError: "),
        ("x = 1\n\0", r"missing\.py.*null bytes"),
    ],
)
def test_script_that_cannot_start_is_named_before_anything_is_written(tmp_path, text, message):
    script = tmp_path / "missing.py"
    if text is not None:
        script.write_text(text)
    with pytest.raises(ScriptError, match=message):
        run_under_policy(script, [], "fp32", record=tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()
