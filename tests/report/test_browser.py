"""The page in a real browser: no console message, the verdict shown, every figure painted, in light and in dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scenarios

from halfstep.report import html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1200, 4200

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]


def chromium(profile: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console_lines(stderr: str) -> list[str]:
    """What the page, and not the browser, wrote to the log."""
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return html.write(tmp_path / "report.html", *scenarios.three_policies())


def test_a_message_in_the_console_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text("<!DOCTYPE html><script>console.error('heard')</script>")
    assert "heard" in "".join(console_lines(chromium(tmp_path / "profile", page, "--dump-dom").stderr))


def test_the_verdict_is_in_the_document_and_the_console_is_silent(page: Path, tmp_path: Path) -> None:
    result = chromium(tmp_path / "profile", page, "--dump-dom")
    assert console_lines(result.stderr) == []
    heading = re.search(r"<h1.*?</h1>", result.stdout, flags=re.DOTALL)
    assert heading is not None
    shown = re.sub(r"<[^>]*>", "", heading[0]).replace("&nbsp;", " ").replace("\N{NO-BREAK SPACE}", " ")
    _, comparison = scenarios.three_policies()
    assert shown.replace("&amp;", "&") == comparison.verdict


@pytest.mark.parametrize(("theme", "setting", "ground"), [("light", 1, 1.0), ("dark", 0, 0.08)])
def test_verdict_and_figures_are_painted(page: Path, tmp_path: Path, theme: str, setting: int, ground: float) -> None:
    picture, boxes = tmp_path / f"{theme}.png", measured(page, tmp_path)
    result = chromium(
        tmp_path / "profile",
        page,
        f"--blink-settings=preferredColorScheme={setting}",
        f"--screenshot={picture}",
        f"--window-size={WIDTH},{HEIGHT}",
    )
    assert console_lines(result.stderr) == []
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert np.abs(pixels[0, 0] - ground).max() < 0.03, f"the ground is not {theme}"
    assert len(boxes) == 5, "the verdict and four figures"
    for left, top, width, height in boxes:
        assert width > 300 and height > 40 and top + height < HEIGHT
        crop = pixels[top : top + height, left : left + width].reshape(-1, 3)
        drawn = np.abs(crop - pixels[0, 0]).max(axis=1) > 0.2
        assert 0.002 < drawn.mean() < 0.6
        assert len(np.unique(crop[drawn].round(2), axis=0)) > 5


def measured(page: Path, folder: Path) -> list[tuple[int, ...]]:
    """Where the verdict and the figures stand on the wide page, asked of the browser by a copy with a script."""
    script = (
        "<script>document.title = JSON.stringify([...document.querySelectorAll('h1, .wide svg')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height].map(Math.round)))</script>"
    )
    source = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    copy = folder / "measured.html"
    copy.write_text(source.replace("</body>", script + "</body>"), encoding="utf-8")
    document = chromium(folder / "measuring", copy, "--dump-dom", f"--window-size={WIDTH},{HEIGHT}").stdout
    title = re.search(r"<title>\[(.*)\]</title>", document)
    assert title is not None
    return [tuple(map(int, box.split(","))) for box in re.findall(r"\[([\d,]+)\]", title[1])]
