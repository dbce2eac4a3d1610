"""`lint`: what can be known before the first step, without running anything of the user's.

Each rule looks at modules, optimizers, policy, scaler and device, and yields findings: one for a code and an optimizer,
group or module, not one for every tensor. `halfstep.doctor.lints` lists them. They read: no parameter, state, gradient
or random number changes.

Silent by design: frozen 16-bit backbones under FP32 adapters, 16-bit models without an optimizer, FP32 parameters under
any autocast, and everything that halfstep's masters look after. Severity: an *error* surely spoils training, a
*warning* likely does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from halfstep.doctor.finding import Finding, Severity, ordered
from halfstep.doctor.lints import buffers, parameters, reduction, setup, state
from halfstep.doctor.lints.setting import Setting
from halfstep.hardware import DeviceFacts
from halfstep.policy import Policy, parse

Rule = Callable[[Setting], Iterable[Finding]]

#: By the code that it finds.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "HS207": setup.needless_scaler,
        "HS208": setup.missing_scaler,
        "HS304": parameters.without_masters,
        "HS305": state.moments,
        "HS306": parameters.learning_rate,
        "HS307": state.betas,
        "HS308": state.eps,
        "HS309": parameters.weight_decay,
        "HS310": buffers.statistics,
        "HS311": state.compensation,
        "HS409": buffers.constants,
        "HS410": setup.probabilities,
        "HS501": setup.idle_autocast,
        "HS502": setup.slow_fp16,
        "HS503": setup.emulated_bf16,
        "HS504": setup.compiled,
        "HS505": parameters.from_checkpoint,
        "HS508": reduction.reduced_low,
    }
)


def lint(
    modules: nn.Module | Iterable[nn.Module],
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    policy: Policy | str | None,
    scaler: Any = None,
    facts: DeviceFacts | None = None,
    training: bool | None = None,
) -> list[Finding]:
    """Findings about a set-up, worst first.

    ::

        for finding in lint(model, optimizer, policy=policy.parse("bf16-mixed")):
            print(finding)

    Args:
        modules: the outermost ones: models, losses, averaged copies.
        optimizers: all that step; before or after their first step.
        policy: or its text; what the run computes in; None: not known (the script may open autocast by itself).
        scaler: the loss scaler in use, if any: PyTorch's, halfstep's, or anything with ``is_enabled()``.
        facts: of the device that autocast is opened for.
        training: whether backward passes will run; None: if there are optimizers.

    A rule that fails stops no other, and nothing is raised: it is a note, HS506.
    """
    policy = None if policy is None else parse(policy)
    failures: dict[str, list[str]] = {}
    found: list[Finding] = []
    try:
        outermost = (modules,) if isinstance(modules, nn.Module) else tuple(modules)
        steppers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        setting = Setting(outermost, steppers, policy, scaler, facts, training)
    except Exception as error:
        return [_failed(_described(error), ["all"])]
    for code, rule in RULES.items():
        try:
            found += rule(setting)
        except Exception as error:  # of foreign modules and optimizers, in whose properties anything may happen
            failures.setdefault(_described(error), []).append(code)
    return ordered([*found, *(_failed(error, codes) for error, codes in failures.items())])


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _failed(error: str, codes: list[str]) -> Finding:
    return Finding(
        "HS506",
        None,
        f"lint rules did not come to an end ({', '.join(codes)}): {error}",
        "What they would have found is not known; the others were asked.",
        "Please report it, with the model's and the optimizer's class.",
        Severity.NOTE,
        {"rules": " ".join(codes)},
    )
