"""Run a Python file as ``python file.py args…`` would: same argv, ``__main__``, cwd, exit code and traceback.

The file's code runs in a fresh ``__main__`` module in this process. When it raises, the traceback printed is the
script's own: frames of halfstep and of the import system are left out of it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import os
import sys
import tokenize
import traceback
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType

_OUR_FOLDER = str(Path(__file__).resolve().parent.parent) + os.sep


class ScriptError(ValueError):
    """The script cannot be started; the message says why and where."""


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    exit_code: int
    error: BaseException | None = None  #: what ended it, `SystemExit` and `KeyboardInterrupt` included


def load(path: Path) -> CodeType:
    """Read and compile a script.

    Raises:
        ScriptError: no such file, not readable, or not valid Python; the message has file and line.
    """
    if path.is_dir():
        raise ScriptError(f"{path} is a folder; name the script in it")
    if not path.exists():
        raise ScriptError(f"no script {path} here")
    try:
        with tokenize.open(path) as file:  # honours an encoding line, as Python does
            # An absolute file name, as Python has it; and none of this file's own __future__ imports.
            return compile(file.read(), str(path.absolute()), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ScriptError(f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ScriptError(f"{path}: cannot be read: {error}") from error


def run(path: Path, code: CodeType, arguments: Sequence[str]) -> Outcome:
    """Run compiled ``code`` as ``__main__``; whatever it raises ends in the outcome, printed as Python would."""
    with _as_main(path, arguments) as namespace:
        try:
            exec(code, namespace)
            outcome = Outcome(0)
        except SystemExit as stop:
            outcome = Outcome(_exit_code(stop), stop)
        except KeyboardInterrupt as stop:
            print_traceback(stop)
            outcome = Outcome(130, stop)
        except Exception as error:
            print_traceback(error)
            outcome = Outcome(1, error)
        _flush()
        return outcome


def print_traceback(error: BaseException) -> None:
    """Print ``error`` to stderr through ``sys.excepthook``, without the frames that are ours."""
    shown = strip(error.__traceback__)
    for linked in (error, *_chain(error)):
        linked.__traceback__ = strip(linked.__traceback__)
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(type(error), error, shown)
    else:
        sys.excepthook(type(error), error, shown)


def strip(frames: TracebackType | None) -> TracebackType | None:
    """The traceback without frames of halfstep's own files (a built-in workload is a script, not ours)."""
    if frames is None:
        return None
    rest = strip(frames.tb_next)
    file = frames.tb_frame.f_code.co_filename
    if file.startswith(_OUR_FOLDER) and not file.startswith(_OUR_FOLDER + "workloads" + os.sep):
        return rest
    return TracebackType(rest, frames.tb_frame, frames.tb_lasti, frames.tb_lineno)


@contextlib.contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[dict[str, object]]:
    main = types.ModuleType("__main__")
    main.__file__ = str(path.absolute())
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(path.absolute()))
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    before_main, before_argv, before_path = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"] = main
    sys.argv = [str(path), *arguments]
    sys.path[0] = str(path.resolve().parent)
    try:
        yield main.__dict__
    finally:
        sys.modules["__main__"], sys.argv = before_main, before_argv
        sys.path[:] = before_path


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)  # sys.exit("message"), as Python does
    return 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    waiting = [error.__cause__, error.__context__]
    while waiting:
        linked = waiting.pop()
        if linked is not None and id(linked) not in seen:
            seen.add(id(linked))
            waiting += [linked.__cause__, linked.__context__]
            yield linked


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the script, or a broken pipe
            stream.flush()
