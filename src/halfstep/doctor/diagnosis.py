"""`Diagnosis`: all that one ``halfstep doctor`` learnt, as one document for the report and for ``--json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep.doctor import finding
from halfstep.doctor.finding import Finding
from halfstep.doctor.predict import FormatPrediction
from halfstep.observe.ops import Profile
from halfstep.record import strict_json

SCHEMA_VERSION = 1


class DiagnosisError(ValueError):
    """A file is not a readable diagnosis; the message says which and why."""


@dataclass(frozen=True)
class DiagnosedStep:
    """One optimizer step of the run under the asked policy."""

    step: int
    loss: float | None
    applied: bool
    scale: float | None  #: the loss scale of this step's gradients; None without loss scaling
    underflow: Mapping[str, float]  #: per layer, the share of gradient elements that are zero here and not in FP32


@dataclass(frozen=True)
class Diagnosis:
    """What was asked, what was seen, what is wrong, what helps."""

    command: tuple[str, ...]
    policy_requested: str
    policy: str
    reason: str
    started: str  #: UTC, ISO 8601
    environment: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    predictions: tuple[FormatPrediction, ...] = ()
    profile: Profile | None = None  #: one FP32 step
    steps: tuple[DiagnosedStep, ...] = ()
    notes: tuple[str, ...] = ()  #: what could not be done, and limits that a reader has to know
    schema: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> dict[str, Any]:
        """Plain values; non-finite numbers as the strings that run records use."""
        values = {
            **vars(self),
            "findings": [finding.to_json(item) for item in self.findings],
            "predictions": [item.to_json() for item in self.predictions],
            "profile": None if self.profile is None else self.profile.to_json(),
            "steps": [dict(vars(step)) for step in self.steps],
        }
        plain: dict[str, Any] = strict_json(values)
        return plain


def from_json(values: Mapping[str, Any]) -> Diagnosis:
    """The diagnosis that `Diagnosis.to_json` wrote.

    Raises:
        DiagnosisError: of another schema, or not one at all.
    """
    if values.get("schema") != SCHEMA_VERSION:
        raise DiagnosisError(f"diagnosis schema {values.get('schema')!r}, this halfstep reads {SCHEMA_VERSION}")
    try:
        given = dict(values)
        given["command"] = tuple(given["command"])
        given["notes"] = tuple(given["notes"])
        given["findings"] = tuple(finding.from_json(item) for item in given["findings"])
        given["predictions"] = tuple(FormatPrediction.from_json(item) for item in given["predictions"])
        given["profile"] = None if given["profile"] is None else Profile.from_json(given["profile"])
        given["steps"] = tuple(DiagnosedStep(**_numbers(step)) for step in given["steps"])
        return Diagnosis(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise DiagnosisError(f"not a diagnosis: {type(error).__name__}: {error}") from error


def read(path: str | os.PathLike[str]) -> Diagnosis:
    """
    Raises:
        DiagnosisError: the file is missing or not a diagnosis.
    """
    path = Path(path)
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DiagnosisError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise DiagnosisError(f"{path}: {error}") from error


def _numbers(step: Mapping[str, Any]) -> dict[str, Any]:
    decoded = {key: float(value) if isinstance(value, str) else value for key, value in step.items()}
    decoded["underflow"] = {layer: float(share) for layer, share in step["underflow"].items()}
    return decoded
