"""Drawing with matplotlib into SVG that belongs to the page: its font, its colours, its dark mode.

matplotlib knows neither CSS variables nor the font of the page, so every colour here is a reserved hex code
that stands for a variable, and is replaced by it in the finished text; text stays text and inherits the
page's font. What HTML does not need (prolog, namespaces, metadata, unused ids) is taken out, coordinates are
rounded to a hundredth of a pixel, and the ids that are left carry the figure's name, so that many figures
live in one page.

One unit of a figure is one CSS pixel. Each is painted twice, for a wide and for a narrow page, so that its
letters stay as large as the page's own. Nothing here touches pyplot or leaves a changed matplotlib setting
behind.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 860, 390  #: pixels
FONT = 12.0
SMALL = 11.0

TEXT, MUTED, GRID, ZONE, SURFACE = (f"#0c000{i}" for i in range(1, 6))
_VARIABLES = {TEXT: "text", MUTED: "muted", GRID: "rule", ZONE: "zone", SURFACE: "surface"}

SERIES_COLORS = 8  #: the first is the baseline's; as many as page.css defines
CATEGORY_COLORS = 7
_SOLID = "0"
#: dash patterns in pixels, SVG's own notation; with the colours they repeat after 8 × 5 policies
_DASHES = (_SOLID, "7 3", "2 2.5", "8 2.5 2 2.5", "12 3")


@dataclass(frozen=True)
class Look:
    """Colour and dash pattern of one policy, the same in every figure and in the tables."""

    index: int

    @property
    def color(self) -> str:
        return f"#0a00{self.index % SERIES_COLORS:02x}"

    @property
    def variable(self) -> str:
        return f"--series-{self.index % SERIES_COLORS}"

    @property
    def dashes(self) -> str:
        return _DASHES[self.index % len(_DASHES)]

    @property
    def linestyle(self) -> Any:
        """The dash pattern as matplotlib takes it for a line 1 pixel wide."""
        return "-" if self.dashes == _SOLID else (0, tuple(float(length) for length in self.dashes.split()))


@dataclass(frozen=True)
class Drawing:
    """One figure for both page widths."""

    wide: str
    narrow: str


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look for each policy, in order: the baseline, which comes first, is neutral."""
    return {policy: Look(index) for index, policy in enumerate(policies)}


def category_color(index: int) -> str:
    return f"#0b00{index % CATEGORY_COLORS:02x}"


def category_variable(index: int) -> str:
    return f"--category-{index % CATEGORY_COLORS}"


def draw(name: str, label: str, height: Mapping[int, float], paint: Callable[[Figure, bool], None]) -> Drawing:
    """Paint a figure at both widths.

    Args:
        name: prefix of the ids, unique in the page.
        label: what the figure shows, for those who do not see it.
        height: pixels for ``WIDE`` and for ``NARROW``.
        paint: ``paint(figure, narrow)`` draws into an empty figure.
    """
    return Drawing(
        wide=_draw(f"{name}-wide", label, WIDE, height[WIDE], lambda figure: paint(figure, False)),
        narrow=_draw(f"{name}-narrow", label, NARROW, height[NARROW], lambda figure: paint(figure, True)),
    )


def panel(figure: Figure, *, left: float, top: float, right: float, height: float, **options: Any) -> Axes:
    """Axes placed in pixels: ``left`` and ``right`` margins, distance from the top, height."""
    width, total = (72 * inches for inches in figure.get_size_inches())
    box = (left / width, 1 - (top + height) / total, (width - left - right) / width, height / total)
    axes = figure.add_axes(box, facecolor="none", **options)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(left=False, bottom=False, colors=MUTED, labelsize=SMALL, pad=6)
    axes.tick_params(which="minor", left=False, bottom=False, labelleft=False, labelbottom=False)
    return axes


def drawable(text: str) -> str:
    """``text`` without what neither XML nor matplotlib can hold: control characters and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _draw(name: str, label: str, width: float, height: float, paint: Callable[[Figure], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {  # the stubs enumerate all names, which a plain dict of str is not
        "svg.fonttype": "none",
        "svg.hashsalt": "halfstep",
        "text.parse_math": False,
        "path.simplify": False,
        "font.family": "sans-serif",
        "font.size": FONT,
        "text.color": TEXT,
    }
    buffer = io.StringIO()
    # Names from a record may hold letters that matplotlib's font lacks; the page's fonts have their own.
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_visible(False)
        paint(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(buffer.getvalue(), name, label)


def _for_page(text: str, name: str, label: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"#0[abc]00[0-9a-f]{2}", _variable, text)
    text = re.sub(r" font-family: [^;\"]*(; )?", " ", text)
    text = text.replace("font-weight: 700", "font-weight: 600")
    text = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", text)
    text = re.sub(r'(?<= )(d|x|y|transform)="[^"]*"', _rounded, text)
    text = text.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib wrote an SVG without viewBox"
    title = _attribute(drawable(label))
    text = re.sub(r"<svg[^>]*>", lambda _: f'<svg {view_box[0]} role="img" aria-label="{title}">', text, count=1)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _variable(match: re.Match[str]) -> str:
    code = match[0]
    if code in _VARIABLES:
        return f"var(--{_VARIABLES[code]})"
    kind = "series" if code[2] == "a" else "category"
    return f"var(--{kind}-{int(code[-2:], 16)})"


def _rounded(match: re.Match[str]) -> str:
    numbers = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), match[0])
    return re.sub(r"\s+", " ", numbers)


def _attribute(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text
