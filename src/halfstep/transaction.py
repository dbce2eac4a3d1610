"""A step is a transaction: what has begun to be written is written to its end, whatever interrupts it.

Ctrl-C, an alarm or a failing allocation may raise between any two lines. Copies to go back to would take the memory of
a model and its optimizer, so the way out is forward: first everything is computed that can fail, and nothing is
written; then all of it is written by one function that may be called again, and `to_the_end` calls it until it has
ended. Only then does the interruption go on its way. So there are two states to be interrupted in, before and after.
"""

from __future__ import annotations

from collections.abc import Callable

#: What fails so often is no interruption.
ATTEMPTS = 4


def to_the_end(write: Callable[[], None], what: str = "the step") -> None:
    """Call ``write``; if it raises, call it again until it has ended, and raise then.

    Args:
        write: whatever it had done when it raised, a further call does the rest.
        what: is written, for the note that the exception gets.
    """
    interruption: BaseException | None = None
    for _ in range(ATTEMPTS):
        try:
            write()
        except BaseException as error:  # Ctrl-C among them: it is raised below
            interruption = interruption or error
            continue
        if interruption is None:
            return
        interruption.add_note(f"halfstep: {what} was under way, and was finished before this was raised")
        break
    else:
        assert interruption is not None
        interruption.add_note(
            f"halfstep: {what} failed {ATTEMPTS} times, and parts of it may be written: where it is no refusal of what "
            "it was given, the step cannot be repeated, and exact numbers are in the last checkpoint"
        )
    raise interruption
