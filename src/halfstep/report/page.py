"""What every page is made of and how it reaches the disk: one HTML file that needs nothing but itself.

A page has no script and loads nothing; a content security policy in its head makes the browser hold it to that. Every
word passes through the template's escaping; only the SVG drawn here and the stylesheet are inserted as they are.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from halfstep.report import wording


def fill(template: str, **values: Any) -> str:
    """The page that a template of this package makes of ``values``; ``style`` and ``wording`` are there already."""
    pages = Environment(
        loader=PackageLoader("halfstep", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(typeset=_typeset, unbroken=_unbroken)
    style = files("halfstep.report").joinpath("page.css").read_text(encoding="utf-8")
    pages.globals.update(wording=wording, style=Markup(style))
    return pages.get_template(template).render(**values)


def write(path: str | os.PathLike[str], page: str) -> Path:
    """Write a page to ``path``, whole or not at all: a failure leaves what was there before.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    # Words that are not valid Unicode cannot be in a UTF-8 file; they become question marks.
    encoded = page.encode("utf-8", errors="replace")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:  # names the file that was asked for, not the temporary one
        raise OSError(error.errno, f"the report cannot be written here: {error.strerror}", str(path)) from error
    part = Path(name)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
        with os.fdopen(descriptor, "wb") as file:
            file.write(encoded)
        part.chmod(0o666 & ~_umask())  # mkstemp's own mode would keep others from reading the report
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    return path


def _typeset(text: str) -> str:
    """A number with a true minus sign in place of the hyphen."""
    return text.replace("-", "−")


def _unbroken(text: str) -> str:
    """Running text that breaks no line between a number and its percent or times sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ×", "\N{NO-BREAK SPACE}×")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
