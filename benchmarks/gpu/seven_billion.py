"""Does a full fine-tuning of a model of LLaMA 7B's shape fit into a card of 80 GB? Yes or no, by trying.

PyTorch's allocator is held to what such a card has free (`torch.cuda.set_per_process_memory_fraction`), whatever this
one has; three steps are then made, of 2 rows of 2048 tokens with activation checkpointing, and either they are made or
the allocator refuses. On a card of less than 80 GB the answer is for that card, and ``limit_gib`` says so.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from gpu import datasheet, timing
from gpu.model import SEVEN_BILLION, TINY_LLAMA, batch_of, decoder
from gpu.section import Section
from gpu.ways import BASELINE, Trainer, Way, ours

_BF16 = torch.bfloat16
_MASTER = Way("", "bf16", "bf16-master", parameters=_BF16)

#: Where a model is 16-bit it is made so: in FP32 the weights alone would be 27 GB more when the run begins.
WAYS = (
    replace(_MASTER, name="16-bit model, 24bit + 8bit", optimizer=ours(master="24bit", state="8bit")),
    replace(BASELINE, name="bf16 autocast, FP32 weights, torch AdamW"),
    replace(
        _MASTER,
        name="16-bit model, 24bit + 8bit, gradients released",
        optimizer=ours(master="24bit", state="8bit", release_gradients=True),
    ),
    replace(_MASTER, name="16-bit model, exact + fp32", optimizer=ours()),
    replace(_MASTER, name="16-bit model, exact + bf16", optimizer=ours(state="bf16")),
    replace(
        _MASTER,
        name="16-bit model, exact + fp32, gradients released",
        optimizer=ours(release_gradients=True),
    ),
    replace(_MASTER, name="16-bit model, exact + 8bit", optimizer=ours(state="8bit")),
    Way("bf16-master, bf16 gradients, 8-bit state", "bf16", "bf16-master:grads=bf16", ours(state="8bit")),
    Way("pure bf16, torch AdamW", "bf16", parameters=_BF16),
)
STEPS = 3


def seven_billion(s: Section) -> None:
    limit = _hold_to_80_gb() if s.cuda else None
    for way in WAYS:
        if s.has_time(way.name, 10):
            with s.part(way.name):
                _try(s, way, limit)


def _hold_to_80_gb() -> float:
    """Limit PyTorch's allocator; returns the limit in GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    wanted = (datasheet.CARD_OF_80_GB - datasheet.CONTEXT) * 2**20
    if wanted < total:
        torch.cuda.set_per_process_memory_fraction(wanted / total)
    return min(wanted, total) / 2**30


def _try(s: Section, way: Way, limit: float | None) -> None:
    size = TINY_LLAMA if s.tiny else SEVEN_BILLION
    ids = batch_of(size, 1 if s.tiny else 2, s.device)
    values: dict[str, Any] = {"fits": False, "limit_gib": limit}
    losses: list[float] = []
    trainer = None
    try:
        trainer = Trainer(way, decoder(size, s.device, way.parameters), ids, clip=False)
        values["parameters"] = sum(p.numel() for p in trainer.model.parameters())
        for _ in range(STEPS):
            began = time.monotonic()
            trainer.step()
            timing.synchronize(s.device)
            values["seconds"] = round(time.monotonic() - began, 3)
            losses.append(float(trainer.loss) if trainer.loss is not None else float("nan"))
        values |= {"fits": True, "tokens_per_s": round(ids.shape[0] * size.context / values["seconds"])}
    except torch.OutOfMemoryError as error:
        values |= {"steps_made": len(losses), "said": str(error).partition(". GPU")[0][:160]}
    if s.cuda:
        values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        values["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    s.measure(way.name, **values, losses=losses, rows=ids.shape[0], context=size.context)
