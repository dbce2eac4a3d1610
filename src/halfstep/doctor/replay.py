"""Run a bad step again: `replay` reads what `halfstep.MixedPrecision.watch` saved.

::

    model, optimizer = ...                        # built as in the run
    mp = halfstep.MixedPrecision(model, optimizer, policy=...)
    step = halfstep.doctor.replay("halfstep-watch/step-000012.pt")
    step.restore(mp)                              # weights, buffers, optimizer, loss scale, train and eval modes
    for x, y in step:                             # its batches, each with the random numbers that it had
        ...                                       # the body of the loop, up to backward

On the same machine with as many threads, the forward and backward passes give the same bits, dropout included: put a
debugger, `halfstep.doctor.examine` or a print where they go wrong. Nothing in the file is run: it is read by
`halfstep.load`, which verifies it and takes tensors and plain values only. Classes of batches come from the caller.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.checkpoint import load
from halfstep.engine import MixedPrecision
from halfstep.observe.bad_steps import FORMAT
from halfstep.observe.batches import decode
from halfstep.observe.randomness import RandomStates, random_states
from halfstep.observe.step_start import bare, local
from halfstep.observe.watch import GradientReading


class Replay:
    """A bad step, as it was saved.

    Attributes:
        path: its file.
        step: its number, from the opening of the watch on.
        policy: of the run, as text.
        what: why it is bad.
        done: what became of it.
        applied: whether it was taken.
        scale: its loss scale; None without loss scaling.
        losses: their magnitudes, one per backward pass, before scaling.
        gradients: largest magnitudes by parameter, as they arrived: times the loss scale.
        missing: what could not be saved or is not as it was, by place.
    """

    def __init__(self, path: str | os.PathLike[str], content: Mapping[str, Any], types: Iterable[type] = ()) -> None:
        self.path = os.fspath(path)
        self.step: int = content["step"]
        self.policy: str = content["policy"]
        self.what: str = content["what"]
        self.done: str = content["done"]
        self.applied: bool = content["applied"]
        self.scale: float | None = content["scale"]
        self.losses: tuple[float, ...] = tuple(content["losses"])
        self.gradients = GradientReading(content["gradients"])
        self.missing: Mapping[str, str] = content["missing"]
        self._content = content
        self._types = tuple(types)

    def __str__(self) -> str:
        said = f"{self.what} ({self.policy}). {self.done}."
        return said + "".join(f"\n{place}: {note}" for place, note in self.missing.items())

    @property
    def batches(self) -> list[Any]:
        """The step's batches in their order; made anew each time, so that a loop may change them."""
        return [self._batch(entry) for entry in self._content["batches"]]

    def __len__(self) -> int:
        return len(self._content["batches"])

    def __iter__(self) -> Iterator[Any]:
        """The batches, with the random states before each set as they were; put back at the end."""
        for index, entry in enumerate(self._content["batches"]):
            batch = self._batch(entry)
            with self.rng(index):
                yield batch

    @contextlib.contextmanager
    def rng(self, index: int = 0) -> Iterator[None]:
        """Within, random numbers go on as they did after this batch was handed out; afterwards from where they were."""
        with random_states(RandomStates.from_plain(self._content["batches"][index]["random"])):
            yield

    def restore(self, mp: MixedPrecision) -> None:
        """Bring a model, its optimizer and its loss scale to where they were before the step.

        Raises:
            ValueError: another policy, or another model than the run's; nothing is changed then.
        """
        if str(mp.policy) != self.policy:
            raise ValueError(
                f"{self.path} is a step of policy {self.policy!r}, and this MixedPrecision's is {str(mp.policy)!r}: "
                "build it with policy=replay.policy. (To try the step under another policy, copy the weights only: "
                "replay.load_model(model).)"
            )
        self.load_model(mp.model)
        if self._content["mp"] is not None:
            mp.load_state_dict(self._content["mp"])
        elif mp.scaler.is_enabled():
            mp.scaler.load_state_dict(self._content["scaler"])

    @torch.no_grad()
    def load_model(self, model: nn.Module) -> None:
        """Copy parameters, buffers and train or eval modes into a model; formats may differ.

        Raises:
            ValueError: it is another model than the run's; nothing is changed then.
        """
        model = bare(model)
        pairs = _pairs(self.path, "parameter", self._content["parameters"], dict(model.named_parameters()))
        pairs += _pairs(
            self.path, "buffer", self._content["buffers"], dict(model.named_buffers(remove_duplicate=False))
        )
        for saved, target in pairs:
            target.copy_(saved)
        training = set(self._content["training"])
        for name, module in model.named_modules():
            module.training = name in training

    def _batch(self, entry: Mapping[str, Any]) -> Any:
        return decode(copy.deepcopy(entry["batch"]), self._types)


def replay(path: str | os.PathLike[str], *, types: Iterable[type] = ()) -> Replay:
    """Read a bad step that `halfstep.MixedPrecision.watch` saved.

    Args:
        types: classes of batches that are no plain containers, as ``[BatchEncoding]``: what is of these comes back as
            it was, made without ``__init__`` where it is not a mapping. Others come as dicts with attributes.

    Raises:
        CheckpointError: the file is damaged, or no file of `halfstep.save`.
        ValueError: it is another kind of file, or of a newer halfstep.
    """
    content = load(path)
    if not isinstance(content, dict) or content.get("kind") != "halfstep bad step":
        raise ValueError(f"{path} is a checkpoint, but no bad step: those are written by MixedPrecision.watch")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']} (of halfstep {content['halfstep']}), and this halfstep reads "
            f"{FORMAT}: use the version that wrote it"
        )
    return Replay(path, content, types)


def _pairs(
    path: str, kind: str, saved: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """What to copy where, once it is known that all of it fits."""
    for name in [*saved, *there]:
        if name not in saved or name not in there:
            has, lacks = ("the model", path) if name in there else (path, "the model")
            raise ValueError(f"{has} has a {kind} {name!r} that {lacks} lacks: build the model as in the run")
    pairs = []
    for name, value in saved.items():
        target = local(there[name])
        if target.shape != value.shape:
            raise ValueError(
                f"{kind} {name!r} is of shape {tuple(value.shape)} in {path}, and of {tuple(target.shape)} in the "
                "model: build the model as in the run, on as many ranks"
            )
        pairs.append((value, target))
    return pairs
