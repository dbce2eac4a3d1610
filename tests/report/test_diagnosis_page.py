"""The doctor's page and its terminal twin: findings first, one closed harmless file, nothing cut."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from functools import cache
from pathlib import Path

import diagnosis_scenarios as scenarios
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from test_browser import CHROMIUM, chromium, console_lines, measured
from test_html import Page

from halfstep.doctor.finding import Severity, ordered
from halfstep.report import diagnosis as report
from halfstep.report import findings_table, findings_wording, predictions

ALL = pytest.mark.parametrize("scene", scenarios.ALL, ids=lambda scene: scene.__name__)


@cache
def rendered(scene) -> str:
    return report.render(scene())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(rendered(scenarios.full))


@ALL
def test_every_scene_makes_one_closed_valid_file(scene) -> None:
    source = rendered(scene)
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>") and {"html", "head", "body"} <= set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert all(ref == "data:," or (ref[0] == "#" and ref[1:] in page.ids) for ref in page.references)
    assert all(ref.startswith("#") and ref[1:] in page.ids for ref in re.findall(r"url\(([^)]*)\)", source))
    assert not re.search(r"https?://|@import", source)
    assert "default-src 'none'" in source
    assert page.tags.count("script") == 1, "the embedded data, which is not run"
    assert "nan" not in "".join(page.paths).lower()
    assert len(source) - len(page.script) < 600_000
    assert set(re.findall(r"var\((--[\w-]+)\)", source)) <= set(re.findall(r"(--[\w-]+):", source))


@ALL
def test_the_embedded_json_is_the_diagnosis(scene) -> None:
    diagnosis = scene()
    page = Page(rendered(scene))
    assert json.loads(page.script) == json.loads(json.dumps(diagnosis.to_json()))


def test_sections_follow_from_findings_to_data(page: Page) -> None:
    names = ["1 error, 1 warning, 1 note under fp16-mixed.", "Findings", "HS101", "HS201", "HS206", "Before switching"]
    names += ["Size of the numbers", "Gradients that became zero", "Loss scale", "Notes and limits", "Environment"]
    place = 0
    for name in [*names, "embedded below as JSON"]:
        place = page.text.index(name, place)


def test_a_finding_says_everything_that_is_known_of_it(page: Page) -> None:
    finding = scenarios.OVERFLOW
    text = page.text[page.text.index("Findings") : page.text.index("HS201")]
    for words in ("HS101", "error", finding.title, "mm in blocks.3.mlp.wo (Linear)", "train.py:41", finding.what):
        assert words in text
    for words in (finding.consequence, finding.remedy, "12 times, first in step 1", "amax 116,213", "share 0.00238"):
        assert words in text
    assert text.index("verified") < text.index("tried, did not help"), "what helped comes first"
    for trial in finding.trials:
        assert trial.remedy in text and trial.evidence in text


def test_policies_and_diffs_can_be_copied_as_they_are(page: Page) -> None:
    blocks = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page.source, flags=re.DOTALL)
    helped, failed = scenarios.OVERFLOW.trials[1], scenarios.OVERFLOW.trials[0]
    assert blocks == [helped.policy, failed.diff]


def test_the_prediction_table_says_what_was_predicted(page: Page) -> None:
    text = page.text[page.text.index("Before switching") : page.text.index("Size of the numbers")]
    for item in scenarios.PREDICTIONS:
        assert item.format in text and item.reason.replace(" ×", "×") in text
    for words in ("43 %", "< 0.1 % scaled", "2¹⁵ 2¹² to 2¹⁹", "blocks.3.mlp.wo, head", "none is safe", "and 6 more"):
        assert words.replace(" ", "") in text.replace(" ", "")
    assert "fp16-mixed:keep_fp32=blocks.3.mlp.wo+head" in text
    assert "at least" in text and "lower bounds" in text


@pytest.mark.parametrize(
    ("place", "usable"), [(0, "limited"), (1, "usable"), (2, "unusable"), (3, "none")], ids=lambda value: str(value)
)
def test_usable_has_four_degrees(place: int, usable: str) -> None:
    assert predictions.row(scenarios.PREDICTIONS[place]).usable_class == usable


def test_empty_cases_say_what_is_missing() -> None:
    text = Page(rendered(scenarios.empty)).text
    for words in (
        "Nothing was examined.",
        "nothing was run",
        "no format was predicted",
        "No FP32 step was profiled",
        "No step was compared with FP32",
        "No run used loss scaling",
    ):
        assert words in text
    assert Page(rendered(scenarios.empty)).images == 0


def test_nothing_found_says_what_was_looked_at() -> None:
    page = Page(rendered(scenarios.clean))
    assert 'h1 class="fine"' in page.source
    assert "Looked at: 10 steps under bf16-mixed, one FP32 step in full, predictions for fp16, bf16" in page.text


@pytest.mark.parametrize(
    ("scene", "looks"), [("full", "errors"), ("only_notes", "fine"), ("clean", "fine")], ids=lambda value: str(value)
)
def test_the_heading_shows_the_worst_severity(scene: str, looks: str) -> None:
    assert f'h1 class="{looks}"' in rendered(getattr(scenarios, scene))


def test_many_findings_of_one_code_are_folded_and_none_is_lost() -> None:
    source = rendered(scenarios.deep)
    assert source.count('<article class="finding') == 1 + report.MOST_PER_CODE
    assert f"{96 - report.MOST_PER_CODE} more findings" in source
    for layer in range(96):
        assert f"model.layers.{layer}.mlp.wi (Linear)" in source


def test_hostile_words_stay_words() -> None:
    page = Page(rendered(scenarios.hostile))
    assert page.source.count("<script") == 1 and page.source.count("</script") == 1
    assert page.text.count("</script><script>alert(1)</script>") >= 20
    assert "i" not in page.tags


def test_the_same_diagnosis_makes_the_same_file() -> None:
    assert report.render(scenarios.full()) == rendered(scenarios.full)


def test_write_makes_the_file_even_of_words_that_are_no_text(tmp_path: Path) -> None:
    path = report.write(tmp_path / "doctor.html", scenarios.hostile())
    assert path.read_text(encoding="utf-8") == rendered(scenarios.hostile).replace("\udcff", "?")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_older_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doctor.html"
    path.mkdir()
    with pytest.raises(OSError):
        report.write(path, scenarios.only_lint())
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------ terminal


def printed(scene, width: int = 80, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    diagnosis = scene()
    findings_table.print_findings(
        console, diagnosis.findings, policy=diagnosis.policy, looked_at=report.looked_at(diagnosis)
    )
    if diagnosis.predictions:
        findings_table.print_predictions(console, diagnosis.predictions)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@ALL
@pytest.mark.parametrize("width", [60, 80, 140])
def test_only_what_is_to_be_copied_is_wider_than_the_terminal(scene, width: int) -> None:
    diagnosis = scene()
    copied = [text for f in diagnosis.findings for t in f.trials for text in (t.policy, t.diff) if text]
    lines = {line.strip() for text in copied for line in text.replace("\udcff", "?").splitlines()}
    for line in printed(scene, width).splitlines():
        # A Chinese letter is two columns wide.
        columns = len(line) + sum(c > "\u2e80" for c in line)
        assert columns <= width or line.strip() in lines or "keep_fp32=" in line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)


def test_the_terminal_says_everything_worst_first() -> None:
    text = " ".join(printed(scenarios.full).split())
    places = [text.index(f"{finding.code} {finding.severity} ") for finding in ordered(scenarios.full().findings)]
    assert places == sorted(places)
    for finding in scenarios.full().findings:
        for words in (finding.title, finding.what, finding.consequence, finding.remedy):
            assert words in text
    assert "train.py:41" in text
    assert text.index("verified: blocks.3.mlp.wo in FP32.") < text.index("tried, did not help:")
    assert "\n       fp16-mixed:keep_fp32=blocks.3.mlp.wo\n" in printed(scenarios.full)


def test_a_finding_that_a_remedy_was_tried_for_is_never_left_out() -> None:
    same = [dataclasses.replace(scenarios.OVERFLOW, trials=()) for _ in range(4)]
    console = Console(file=io.StringIO(), width=80)
    findings_table.print_findings(console, [*same, scenarios.OVERFLOW], policy="fp16-mixed", most_per_code=2)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "verified:" in text and "2 more findings" in text


def test_nothing_found_is_one_sentence_in_the_terminal() -> None:
    assert printed(scenarios.empty) == "Nothing was examined. The notes say why.\n"


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = printed(scenarios.full, force_terminal=True, color_system="standard")
    assert "\x1b[1;31m" in coloured and "\x1b[1;33m" in coloured and "\x1b[36m" in coloured
    assert "\x1b" not in printed(scenarios.full)


# ------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (116213.0, "116,213"),
        (0.1, "0.1"),
        (0.002380001, "0.00238"),
        (131072, "131,072"),
        (-100.0, "-100"),
        (1e-30, "1e-30"),
        (1.25e30, "1.25e+30"),
        (10**400, "about 10^400"),
        (float("inf"), "infinity"),
        (float("nan"), "NaN"),
        (0.0, "0"),
        ("fp16", "fp16"),
        (True, "True"),
    ],
)
def test_quantities(value: float | int | str, text: str) -> None:
    assert findings_wording.quantity(value) == text


def test_a_windows_path_has_a_name_too() -> None:
    place = dataclasses.replace(scenarios.OVERFLOW.place, file=r"C:\me\train.py")  # type: ignore[type-var]
    assert findings_wording.file_line(place) == "train.py:41"
    assert findings_wording.file_line(place, whole=True) == r"C:\me\train.py:41"


def test_counts_start_with_the_worst() -> None:
    found = [scenarios.SETTLING, scenarios.OVERFLOW, scenarios.SETTLING]
    assert findings_wording.counts(found) == "1 error, 2 notes"
    assert ordered(found)[0].severity is Severity.ERROR


# ------------------------------------------------------------------ browser


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(("theme", "setting", "ground"), [("light", 1, 1.0), ("dark", 0, 0.08)])
def test_heading_and_figures_are_painted(tmp_path: Path, theme: str, setting: int, ground: float) -> None:
    short = dataclasses.replace(scenarios.full(), profile=scenarios.profile(scenarios.LAYERS))
    page = report.write(tmp_path / "doctor.html", short)
    picture, boxes = tmp_path / f"{theme}.png", measured(page, tmp_path)
    options = [f"--blink-settings=preferredColorScheme={setting}", f"--screenshot={picture}"]
    result = chromium(tmp_path / "profile", page, *options, "--window-size=1200,4200")
    assert console_lines(result.stderr) == []
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert np.abs(pixels[0, 0] - ground).max() < 0.03, f"the ground is not {theme}"
    assert len(boxes) == 4, "the heading and three figures"
    for left, top, width, height in boxes:
        assert width > 300 and height > 40 and top + height < 4200
        crop = pixels[top : top + height, left : left + width].reshape(-1, 3)
        drawn = np.abs(crop - pixels[0, 0]).max(axis=1) > 0.2
        assert 0.002 < drawn.mean() < 0.6


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("scene", [scenarios.full, scenarios.hostile], ids=lambda scene: scene.__name__)
def test_nothing_but_tables_and_code_scrolls_sideways_on_a_phone(scene, tmp_path: Path) -> None:
    page = report.write(tmp_path / "doctor.html", scene())
    # Headless windows are 500 pixels wide at least, so the page is shown in a frame.
    script = (
        "<script>addEventListener('load', () => { const d = document.querySelector('iframe').contentDocument;"
        "document.title = 'W' + d.documentElement.scrollWidth + '/' + d.documentElement.clientWidth })</script>"
    )
    source = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    escaped = source.replace("&", "&amp;").replace('"', "&quot;")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe srcdoc="{escaped}" style="width:390px;height:2000px;border:0"></iframe>{script}', "utf-8"
    )
    document = chromium(tmp_path / "profile", frame, "--dump-dom").stdout
    title = re.search(r"<title>W(\d+)/(\d+)</title>", document)
    assert title is not None
    assert (int(title[1]), int(title[2])) == (390, 390)
