"""The verdict: one sentence for each policy, in words that hold for every way a comparison can turn out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfstep.compare import phrases
from halfstep.compare.result import PolicyResult, Quality, QualityVerdict

_GRAVEST_FIRST: tuple[QualityVerdict | None, ...] = (
    "diverged",
    "worse",
    "cannot tell",
    "better",
    "same",
    None,
)


@dataclass(frozen=True)
class Subject:
    """A policy's result and what a sentence needs beside it."""

    result: PolicyResult
    label: str  #: its name, and the policy in effect where that differs: ``auto (bf16-mixed)``
    steps: int  #: summed over runs


def verdict(subjects: Sequence[Subject], baseline: str) -> str:
    """What the comparison concludes, baseline's troubles first."""
    base = next((s for s in subjects if s.result.policy == baseline), None)
    others = [s for s in subjects if s.result.policy != baseline]
    if all(s.steps == 0 and _all(s, "finished") for s in subjects):
        return "Nothing was trained: the script never called backward() followed by an optimizer's step()."
    if base is None:
        return " ".join([f"There is no {baseline} run to compare with.", *map(_alone, others)])
    if _all(base, "crashed"):
        failure = f"{base.label}, the baseline,{_crash(base)}, so nothing can be compared with it."
        return " ".join([failure, *map(_alone, others)])
    if not others:
        return f"{_alone(base)} No other policy was run to compare it with."
    sentences = [_compared(s, base) for s in others]
    diverged = base.result.outcomes.count("diverged")
    if diverged:
        where = phrases.runs(diverged, len(base.result.outcomes))
        sentences.append(f"{base.label}, the baseline, diverged itself{where}.")
    return " ".join([*sentences, *_cut_short(base)])


def _compared(subject: Subject, base: Subject) -> str:
    result, name = subject.result, base.label
    if (trouble := _no_result(subject)) is not None:
        return trouble
    if "diverged" in result.outcomes:
        where = phrases.runs(result.outcomes.count("diverged"), len(result.outcomes))
        return " ".join([f"{subject.label} diverged{where}: its loss ended as NaN or infinity.", *_cut_short(subject)])
    clauses = f"{subject.label} {_speed(result, name)}{_memory(result)}{_quality(result.quality)}."
    return " ".join([clauses, *_cut_short(subject)])


def _alone(subject: Subject) -> str:
    """A policy by itself, where there is nothing to hold it against."""
    result = subject.result
    if (trouble := _no_result(subject)) is not None:
        return trouble
    took = "made too few steps to be timed"
    if result.speed is not None:
        took = f"took {phrases.duration(result.speed.median_seconds)} a step"
    losses = [phrases.number(quality.final_loss, 4) for quality in result.quality]
    ended = ""
    if losses:
        ended = f" and ended at {'a loss' if len(losses) == 1 else 'losses'} of {' and '.join(losses)}"
    return " ".join([f"{subject.label} {took}{ended}.", *_cut_short(subject)])


def _no_result(subject: Subject) -> str | None:
    if _all(subject, "crashed"):
        return f"{subject.label}{_crash(subject)}."
    if subject.steps == 0:
        if "finished" in subject.result.outcomes:
            made = "made no step: the script never called backward() followed by an optimizer's step()"
        else:
            made = "was stopped before its first step"
        return " ".join([f"{subject.label} {made}.", *_cut_short(subject)])
    return None


def _speed(result: PolicyResult, name: str) -> str:
    speed = result.speed
    if speed is None or speed.speed_up is None:
        reason = "no step was timed after the warm-up" if speed is None else speed.reason
        return f"trains at a speed that cannot be compared with {name}'s ({reason})"
    if speed.verdict == "faster":
        return f"trains {phrases.ratio(speed.speed_up)[0]} × faster than {name} ({speed.reason})"
    if speed.verdict == "slower":
        factor, _ = phrases.ratio(phrases.inverse(speed.speed_up))
        return f"trains {factor} × slower than {name} ({speed.reason})"
    if speed.verdict == "same":
        return f"trains as fast as {name} ({speed.reason})"
    if speed.speed_up.low > 1 or speed.speed_up.high < 1:
        direction = "faster" if speed.speed_up.low > 1 else "slower"
        return f"trains {direction} than {name}, by how much cannot be told ({speed.reason})"
    return f"trains at a speed that cannot be told from {name}'s ({speed.reason})"


def _memory(result: PolicyResult) -> str:
    if result.memory_ratio is None:
        return ""
    clear = result.speed is not None and result.speed.verdict in ("faster", "slower")
    share = 100 * result.memory_ratio
    return (
        f"{'' if clear else ','} in {share:.0f} % of the memory" if share >= 10 else f", in {share:.1f} % of the memory"
    )


def _quality(qualities: Sequence[Quality]) -> str:
    """The gravest verdict among the optimizers' losses: a GAN is no better than its worse half."""
    if not qualities:
        return "; no loss was recorded to compare"
    gravest = min(qualities, key=lambda quality: _GRAVEST_FIRST.index(quality.verdict))
    several = len(qualities) > 1
    loss = f"loss of optimizer {gravest.optimizer}" if several else "loss"
    if gravest.verdict == "same":
        if several:
            each = f"for each of its {len(qualities)} optimizers"
            return f", with the same loss {each}; for the first, {qualities[0].reason}"
        return f", with the same loss: {gravest.reason}"
    if gravest.verdict == "cannot tell":
        return f"; whether its {loss} is the same cannot be told: {gravest.reason}"
    if gravest.verdict == "diverged":
        return f"; its {loss} diverged: {gravest.reason}"
    return f"; its {loss} is {gravest.verdict}: {gravest.reason}"


def _cut_short(subject: Subject) -> list[str]:
    """One more sentence for each way in which some of the runs did not come to their end."""
    outcomes, sentences = subject.result.outcomes, []
    for outcome, verb in (
        ("crashed", "crashed"),
        ("interrupted", "was interrupted"),
        ("running", "is still running"),
    ):
        if n := outcomes.count(outcome):
            where = phrases.runs(n, len(outcomes))
            why = phrases.cited(subject.result.errors) if outcome == "crashed" else ""
            sentences.append(f"{subject.label} {verb}{where}{why}.")
    return sentences


def _crash(subject: Subject) -> str:
    n = len(subject.result.outcomes)
    return f" crashed{phrases.runs(n, n)}{phrases.cited(subject.result.errors)}"


def _all(subject: Subject, outcome: str) -> bool:
    return all(o == outcome for o in subject.result.outcomes)
