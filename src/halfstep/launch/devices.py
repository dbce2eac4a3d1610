"""Where a script's modules are, which is known only once it calls them, and what that makes of its policy.

A policy is chosen before the script starts, for the device that scripts usually take. The script may take another: the
CPU, the second GPU, or, by setting ``CUDA_VISIBLE_DEVICES``, one that was not to be seen before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfstep import hardware
from halfstep.policy import resolve

if TYPE_CHECKING:
    from halfstep.launch.session import Session


class ScriptDevices:
    """The devices of the modules that ``session`` has met."""

    def __init__(self, session: Session) -> None:
        self.current: torch.device | None = None  #: of the outermost module called last; None before the first
        self.expected: str | None = None  #: the name of the device that the policy was chosen for
        self._session = session
        self._facts: dict[torch.device, hardware.DeviceFacts] = {}

    def met(self, device: torch.device) -> None:
        """A module on ``device`` is called: choose the policy again, if that is not where it was expected."""
        if device == self.current:
            return
        self.current = device
        session = self._session
        moved = device.type != session.device_type
        if not moved and (device.type == "cpu" or device in self._facts):
            return
        if device not in self._facts:
            try:
                self._facts[device] = hardware.detect(device)
            except hardware.DeviceUnavailableError:  # PyTorch computes there all the same, so nothing is to be told
                session.device_type = device.type
                return
        facts = self._facts[device]
        if not moved and self.expected not in (None, facts.name):
            session.notice(
                "other-device", f"the model is on {facts.name} ({device}), not on the {self.expected} of the header"
            )
        policy, reason = resolve(session.requested, facts)
        if str(policy) != str(session.policy):
            where, instead = (device.type, session.device_type) if moved else (str(device), self.expected)
            session.notice(
                "policy-changed",
                f"the model is on {where}, not on {instead}: policy {policy} instead of {session.policy} ({reason})",
            )
        session.policy, session.device_type = policy, device.type
