"""The doctor's report: one HTML file from a `Diagnosis`, findings first.

From the top: what is wrong and what helped, what each format would do, figures of the numbers behind that, and at the
very end the diagnosis as JSON, so that the page is also the data. Looks and rules are those of the comparison's report
(:mod:`halfstep.report.page`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from halfstep.compare.phrases import count
from halfstep.doctor import finding as findings
from halfstep.doctor.diagnosis import Diagnosis
from halfstep.doctor.finding import Finding, Severity
from halfstep.record import Header, RunRecord, Step
from halfstep.report import environment, findings_wording, page, predictions, svg
from halfstep.report.figures import Chart, exponents, loss_scales, underflow
from halfstep.report.layer_numbers import of_profile

MOST_PER_CODE = 3  #: findings of one code and severity shown in full; the others follow as a table
_HEADINGS = {Severity.ERROR: "errors", Severity.WARNING: "findings", Severity.NOTE: "fine"}


def render(diagnosis: Diagnosis) -> str:
    """The whole page."""
    worst_first = findings.ordered(diagnosis.findings)
    shown, folded = _split(worst_first)
    seen = looked_at(diagnosis)
    return page.fill(
        "diagnosis.html.jinja",
        diagnosis=diagnosis,
        data=diagnosis.to_json(),
        summary=findings_wording.summary(worst_first, diagnosis.policy, seen),
        nothing=f"Nothing found. Looked at: {', '.join(seen)}." if seen else "Nothing found, but nothing was run.",
        heading=_HEADINGS[max((finding.severity for finding in worst_first), default=Severity.NOTE)],
        shown=shown,
        folded=folded,
        most_per_code=MOST_PER_CODE,
        predictions=[predictions.row(item) for item in diagnosis.predictions],
        charts=_charts(diagnosis),
        machine=environment.summary([diagnosis.environment]),
        words=findings_wording,
    )


def write(path: str | os.PathLike[str], diagnosis: Diagnosis) -> Path:
    """Write the page to ``path``, whole or not at all: a failure leaves what was there before.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    return page.write(path, render(diagnosis))


def looked_at(diagnosis: Diagnosis) -> list[str]:
    """What the doctor had in hand, as phrases: what "nothing found" is worth."""
    seen = [f"{count(len(diagnosis.steps), 'step')} under {diagnosis.policy}"] if diagnosis.steps else []
    if diagnosis.profile is not None:
        seen.append("one FP32 step in full")
    if diagnosis.predictions:
        seen.append(f"predictions for {', '.join(item.format for item in diagnosis.predictions)}")
    return seen


def _split(worst_first: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    shown: list[Finding] = []
    folded: list[Finding] = []
    seen: Counter[tuple[str, int]] = Counter()
    for finding in worst_first:
        kind = finding.code, int(finding.severity)
        seen[kind] += 1
        (shown if seen[kind] <= MOST_PER_CODE or finding.trials else folded).append(finding)
    return shown, folded


def _charts(diagnosis: Diagnosis) -> list[Chart]:
    power, source = _loss_scale(diagnosis)
    layers, rule = of_profile(diagnosis.profile) if diagnosis.profile is not None else ([], "")
    remark = " ".join(filter(None, (f"The loss scale is {source}." if source else "", rule)))
    run = _run(diagnosis)
    return [
        exponents(layers, power, remark),
        underflow([(step.step, step.underflow, step.applied) for step in diagnosis.steps]),
        loss_scales({diagnosis.policy: [run]}, svg.looks([diagnosis.policy])),
    ]


def _loss_scale(diagnosis: Diagnosis) -> tuple[int | None, str]:
    """The loss scale to draw as a power of two, and where it comes from."""
    used = [step.scale for step in diagnosis.steps if step.applied and step.scale is not None]
    used = [scale for scale in used if math.isfinite(scale) and scale > 0]
    if used:
        return round(math.log2(used[-1])), "the one of the last applied step"
    for item in diagnosis.predictions:
        if item.format == "fp16" and (power := predictions.power(item)) is not None:
            return power, "the static one predicted for fp16"
    return None, ""


def _run(diagnosis: Diagnosis) -> RunRecord:
    """The steps as the run record that the figures of a comparison are made from."""
    header = Header(
        started=diagnosis.started,
        command=diagnosis.command,
        policy_requested=diagnosis.policy_requested,
        policy=diagnosis.policy,
        reason=diagnosis.reason,
        seed=0,
        environment=diagnosis.environment,
    )
    steps = tuple(
        Step(step.step, 0, step.loss, None, step.applied, step.scale, None, 0, None) for step in diagnosis.steps
    )
    return RunRecord(Path(), header, steps)
