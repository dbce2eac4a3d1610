"""Where a step makes the host wait, and what it launches: on a model so small that the host decides how long it takes.

Counts, so nothing is disturbed by what runs beside. A wait between backward and step leaves the device idle for as long
as the host needs to launch again; on a small model that is most of the step.
"""

from __future__ import annotations

import halfstep
from gpu import timing
from gpu.model import TINY, batch_of, decoder, loss_of
from gpu.section import Section
from gpu.ways import SETTINGS, WAYS, Trainer


def waits(s: Section) -> None:
    ids = batch_of(TINY, 4, s.device)
    for way in WAYS:
        if way.on_a_gpu_only and not s.cuda:
            continue
        for clip in (False, True):
            name = f"{way.name}, {'clipped' if clip else 'not clipped'}"
            if not s.has_time(name, 1):
                continue
            with s.part(name):
                trainer = Trainer(way, decoder(TINY, s.device, way.parameters), ids, clip=clip)
                for _ in range(3):
                    trainer.step()
                _count(s, name, trainer.step)
    with s.part("halfstep AdamW, gradients released and clipped"):
        model = decoder(TINY, s.device).bfloat16()
        optimizer = halfstep.optim.AdamW(model.parameters(), **SETTINGS, release_gradients=True)
        assert optimizer.release is not None
        optimizer.release.max_grad_norm = 1.0

        def step() -> None:
            loss_of(model, ids).backward()
            optimizer.step()

        step()
        step()
        _count(s, "halfstep AdamW, gradients released and clipped", step)


def _count(s: Section, name: str, step: timing.Step) -> None:
    where = timing.waits(s.device, step)
    found = {key: value for key, value in timing.profiled(s.device, step).items() if not key.endswith("_ms")}
    waited = found.pop("waits", None)
    s.measure(name, waits=sum(where.values()), synchronizations=waited, **found, where=where)
