"""Tokens a second, MFU, memory, launches and waits of a training step, way by way.

All ways train the same decoder on the same batch: one of 124 million parameters (``training``; ``training_compiled``
under `torch.compile`), and one of a billion (``training_large``). The baseline is measured again at the end, which says
how far the card drifted meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from gpu import datasheet, timing
from gpu.model import LARGE, SMALL, TINY, Size, batch_of, decoder
from gpu.section import Section, release_memory
from gpu.ways import BASELINE, WAYS, Trainer, Way, named

AGAIN = replace(BASELINE, name=f"{BASELINE.name}, again")
#: Most seconds for the timed steps of one way: FP32 would take all of them.
MOST_SECONDS = 4.0
OF_LARGE = named(
    BASELINE.name,
    "halfstep bf16-mixed",
    "halfstep bf16-master",
    "halfstep bf16-master, bf16 gradients, halfstep AdamW",
    "halfstep 16-bit model, 24bit + 8bit",
    "torch pure bf16",
    "torch tf32",
    "halfstep 16-bit model, MasterWeights",
    "torch fp16 autocast, torch scaler",
    "halfstep fp16-mixed, halfstep AdamW",
    "torch fp32",
)
OF_COMPILED = named(
    BASELINE.name,
    "halfstep bf16-mixed",
    "halfstep bf16-master",
    "halfstep bf16-mixed, halfstep AdamW",
    "halfstep bf16-master, bf16 gradients, halfstep AdamW",
    "halfstep 16-bit model, 24bit + 8bit",
    "torch pure bf16",
    "torch fp16 autocast, torch scaler",
    "halfstep fp16-mixed",
)


def training(s: Section) -> None:
    measure(s, [*WAYS, AGAIN], SMALL, rows=32, steps=12, needs=5)


def training_large(s: Section) -> None:
    measure(s, [*OF_LARGE, AGAIN], LARGE, rows=8, steps=8, needs=6)
    for way in named(BASELINE.name, "halfstep 16-bit model, 24bit + 8bit"):
        if s.cuda and not s.tiny:
            largest_batch(s, way, LARGE, rows=(16, 24, 32, 48))


def training_compiled(s: Section) -> None:
    # Compilation needs a C++ compiler on a CPU, and minutes of two cores: there it is only called, not measured.
    backed = s.cuda
    measure(s, OF_COMPILED[:1] if s.tiny else OF_COMPILED, SMALL, rows=32, steps=10, needs=20, compiled=backed)


def measure(
    s: Section, ways: Sequence[Way], size: Size, *, rows: int, steps: int, needs: float, compiled: bool = False
) -> None:
    """Measure these ways one after the other, each from the same weights."""
    if s.tiny:  # that each way runs is the business of the section that counts waits
        ways, size, rows, steps = [*dict.fromkeys([*ways[:2], ways[-1]])], TINY, 2, 2
    ids = batch_of(size, rows, s.device)
    for way in ways:
        if (s.cuda or not way.on_a_gpu_only) and s.has_time(way.name, needs):
            with s.part(way.name):
                _measure(s, way, size, ids, steps, compiled)


def _measure(s: Section, way: Way, size: Size, ids: torch.Tensor, steps: int, compiled: bool) -> None:
    if compiled:
        torch._dynamo.reset()
    trainer = Trainer(way, decoder(size, s.device, way.parameters), ids, compiled=compiled)
    release_memory()
    began = time.monotonic()
    trainer.step()
    timing.synchronize(s.device)
    first = time.monotonic() - began
    found = timing.times(s.device, trainer.step, warm=2, steps=steps, most_seconds=MOST_SECONDS)
    tokens = ids.shape[0] * size.context
    rate = tokens / found.median * 1e3
    memory = {}
    if s.cuda:
        memory = {
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        }
    where = timing.waits(s.device, trainer.step)
    s.measure(
        way.name,
        **found.values(),
        tokens_per_s=round(rate),
        mfu=datasheet.share(rate * size.flops_per_token, datasheet.peak(s.device, way.products)),
        products=way.products,
        **memory,
        **{f"step_{name}": value for name, value in timing.profiled(s.device, trainer.step).items()},
        sync_warnings=sum(where.values()),
        where=where,
        first_step_s=round(first, 2),
        loss=None if trainer.loss is None else float(trainer.loss),
        loss_scale=trainer.loss_scale(),
        rows=ids.shape[0],
        context=size.context,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        compiled=compiled,
    )


def largest_batch(s: Section, way: Way, size: Size, rows: Sequence[int]) -> None:
    """What less memory is for: more rows at once. Ends with the first that does not fit, or with the time."""
    for count in rows:
        name = f"largest batch, {way.name}, {count} rows"
        if not s.has_time(name, 8):
            return
        fits, trainer = False, None
        with s.part(name):
            try:
                trainer = Trainer(way, decoder(size, s.device, way.parameters), batch_of(size, count, s.device))
                found = timing.times(s.device, trainer.step, warm=2, steps=3, most_seconds=MOST_SECONDS)
                fits = True
            except torch.OutOfMemoryError:
                s.measure(name, fits=False)
            else:
                peak = round(torch.cuda.max_memory_allocated() / 2**30, 3)
                rate = round(count * size.context / found.median * 1e3)
                s.measure(name, fits=True, **found.values(), tokens_per_s=rate, peak_gib=peak)
            trainer = None
        if not fits:
            return
