"""What machine this is, what halfstep makes of it, and the two speeds that bound everything: copying and launching."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import time

import torch

from gpu import datasheet, timing
from gpu.section import Section
from halfstep import hardware, optim
from halfstep.optim import backends
from halfstep.policy import choose

#: Packages that sections use where they are there.
PACKAGES = ("triton", "numpy", "scipy", "transformers", "pytest", "xdist", "hypothesis", "torchao", "flashoptim")
NVIDIA_SMI = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version,mig.mode.current"


def environment(s: Section) -> None:
    facts = hardware.detect(s.device)
    packages = {name: _version(name) for name in PACKAGES}
    s.note("environment", **hardware.environment(facts), cuda=torch.version.cuda, packages=packages)
    if s.cuda:
        _card(s)
    with s.part("halfstep"):
        policy, reason = choose(facts)
        native = facts.formats["bf16"].support == "native"
        s.check("auto is bf16-mixed where bf16 is native", (str(policy) == "bf16-mixed") is native, reason=reason)
        s.note("formats", **{name: support.support for name, support in facts.formats.items()})
        backend, why = backends.choose("auto", torch.device(s.device))
        name = backend.__name__.rpartition(".")[2] if hasattr(backend, "__name__") else str(backend)
        s.check("the optimizers' fast backend is there", name != "eager", backend=name, why=why)
    with s.part("a step"):  # Triton compiles for it, with a C compiler for what is the host's
        s.note("compilers", **{name: shutil.which(name) is not None for name in ("cc", "gcc", "clang", "nvcc")})
        parameter = torch.nn.Parameter(torch.ones(1000, device=s.device, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        began = time.monotonic()
        optim.AdamW([parameter], lr=0.5).step()
        moved = bool((parameter < 1).all())  # waits for the device
        s.check("AdamW takes a step", moved, seconds=round(time.monotonic() - began, 2))
    with s.part("copy"):
        size = 2**24 if s.tiny else 2**32
        source = torch.zeros(size // 4, device=s.device)
        target = torch.empty_like(source)
        found = timing.times(s.device, lambda: target.copy_(source), warm=3, steps=20)
        rate = 2 * size / found.median / 1e6
        promised = datasheet.bandwidth(s.device)
        s.measure("copy", **found.values(), gb_per_s=round(rate, 1), of_datasheet=datasheet.share(rate, promised))
    with s.part("latency"):
        small = torch.zeros(1, device=s.device)
        small.add_(1)
        timing.synchronize(s.device)
        launch, item = _microseconds(lambda: small.add_(1), 1000), _microseconds(small.item, 200)
        s.measure("latency", launch_us=round(launch, 2), item_us=round(item, 2))


def _card(s: Section) -> None:
    card = torch.cuda.get_device_properties(0)
    s.measure(
        "card", card=card.name, gib=round(card.total_memory / 2**30, 2), multiprocessors=card.multi_processor_count
    )
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        s.note("nvidia-smi", asked=NVIDIA_SMI, line=done.stdout.strip())


def _version(package: str) -> str:
    try:
        return str(getattr(importlib.import_module(package), "__version__", "present"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]


def _microseconds(call: timing.Step, times: int) -> float:
    """Of the host, for one call."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return 1e6 * (time.perf_counter() - began) / times
