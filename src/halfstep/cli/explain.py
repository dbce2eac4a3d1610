"""``halfstep explain``: what a finding's code means, how to make it happen, and what to do about it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from halfstep.doctor.codes import Code

EPILOG = (
    "Examples:  [bold]halfstep explain HS203[/]   ·   [bold]halfstep explain[/]   ·   "
    "[bold]halfstep explain HS401 --json[/]"
)

#: The first digit of a code says what it is about.
GROUPS = {
    "HS1": "Range",
    "HS2": "Loss scale",
    "HS3": "Updates and state",
    "HS4": "Casts and constants",
    "HS5": "Hardware and set-up",
}

SOURCES = {
    "examine": "seen in the ops of a step that ran, beside FP32",
    "predict": "foreseen from one FP32 step",
    "lint": "found in model, optimizer and policy before the first step",
    "run": "noticed in the course of a run",
}

_WIDEST = 100  # longer lines of prose are hard to read


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(explain)


def explain(
    code: Annotated[
        str | None, typer.Argument(help="A finding's code, such as HS203; without one, all are listed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Explain a finding of the doctor: what it is, the smallest reproduction, what to do, who else met it."""
    from halfstep.doctor import codes

    if code is None:
        _list(list(codes.CODES.values()), as_json)
    else:
        _page(codes.get(code), as_json)


def group_of(code: Code) -> str:
    return GROUPS[code.code[:3]]


def _document(code: Code) -> dict[str, Any]:
    return {"code": code.code, "title": code.title, "group": group_of(code), "source": code.source}


def _list(known: list[Code], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_document(code) for code in known], indent=2))
        return
    console = Console(highlight=False)
    for group in GROUPS.values():
        console.print(f"[bold]{group}[/]")
        for code in known:
            if group_of(code) == group:
                console.print(f"  [cyan]{code.code}[/]  [dim]{code.source:<7}[/]  {code.title}", soft_wrap=True)
        console.print()
    for source, meaning in SOURCES.items():
        console.print(f"[dim]{source:<7}  {meaning}[/]", soft_wrap=True)


def _page(code: Code, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**_document(code), "page": code.page}, indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        print(code.page, end="")
        return
    from rich.markdown import Markdown
    from rich.theme import Theme

    heading, _, rest = code.page.partition("\n")
    prose, _, links = rest.partition("## Links\n")
    # Rich centres a first-level heading in a box; a line at the margin reads like halfstep's other output. Colours
    # are the terminal's own, without backgrounds, so that they can be read on dark and on light.
    console.print(f"[bold]{heading.removeprefix('# ')}[/]", soft_wrap=True)
    console.print(f"[dim]{SOURCES[code.source]}[/]\n")
    console.push_theme(Theme({"markdown.code": "cyan", "markdown.h2": "bold"}))
    console.print(Markdown(prose, code_theme="ansi_dark"), width=min(console.width, _WIDEST))
    console.print("\n[bold]Links[/]\n")
    console.print(links.strip(), soft_wrap=True, markup=False)  # a link that is broken into lines cannot be opened
