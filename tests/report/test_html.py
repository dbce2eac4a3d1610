"""The page: what it says and in which order, and that it is one valid, closed, harmless file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scenarios

from halfstep.compare import to_json
from halfstep.report import html, wording

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Page(HTMLParser):
    """A page taken apart; raises where tags do not nest."""

    source: str
    open: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  #: text of the body outside of script and style
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)  #: what the page would load or link to
    paths: list[str] = field(default_factory=list)  #: d of every SVG path
    images: int = 0
    tags: list[str] = field(default_factory=list)
    script: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.script += data
        elif "body" in self.open:
            self.words.append(data)

    def _look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += ("role", "img") in attrs
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value or "")
            if tag == "path" and name == "d":
                self.paths.append(value or "")
            assert not name.startswith("on"), f"event handler {name}"

    @property
    def text(self) -> str:
        """The words with single spaces."""
        return " ".join("".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html.render(*scenarios.three_policies()))


@pytest.mark.parametrize("scene", scenarios.ALL, ids=lambda scene: scene.__name__)
def test_every_scene_makes_one_closed_valid_file(scene, tmp_path: Path) -> None:
    records, comparison = scene()
    source = html.write(tmp_path / "report.html", records, comparison).read_text(encoding="utf-8")
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>") and {"html", "head", "body"} <= set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    # Inside the page, or nothing: no address of another file, host or folder.
    assert all(ref == "data:," or (ref[0] == "#" and ref[1:] in page.ids) for ref in page.references)
    used = re.findall(r"url\(([^)]*)\)", source)
    assert all(ref.startswith("#") and ref[1:] in page.ids for ref in used)
    assert not re.search(r"https?://|@import", source)
    assert page.tags.count("script") == 1, "the embedded data, which is not run"
    assert "nan" not in "".join(page.paths).lower()
    assert len(source.encode()) < 500_000


@pytest.mark.parametrize("scene", scenarios.ALL, ids=lambda scene: scene.__name__)
def test_the_verdict_comes_first_word_for_word(scene) -> None:
    records, comparison = scene()
    page = Page(html.render(records, comparison))
    assert page.text.startswith(" ".join(comparison.verdict.split()))


@pytest.mark.parametrize("scene", scenarios.ALL, ids=lambda scene: scene.__name__)
def test_the_embedded_json_is_the_comparison(scene) -> None:
    records, comparison = scene()
    page = Page(html.render(records, comparison))
    # Through JSON once, because that makes lists of tuples.
    assert json.loads(page.script) == json.loads(json.dumps(to_json(comparison)))


def test_sections_follow_from_verdict_to_data(page: Page) -> None:
    headings = ["Results", "Notices and warnings", "Training loss", "Step time", "Memory at the peak", "Loss scale"]
    places = [page.text.index(heading) for heading in [*headings, "Runs", "Environment", "embedded below as JSON"]]
    assert places == sorted(places)


def test_the_result_table_shows_every_number_of_the_comparison(page: Page) -> None:
    _, comparison = scenarios.three_policies()
    table = page.text[page.text.index("Results") : page.text.index("Notices")].replace("−", "-")
    for result in comparison.policies:
        assert result.policy in table
        assert wording.outcome(result) in table
        assert result.speed is not None
        assert wording.milliseconds(result.speed.median_seconds) in table
        assert wording.quartiles(result.speed) in table
        for quality in result.quality:
            assert wording.number(quality.final_loss, 4) in table
            if quality.difference:
                estimate, interval = wording.difference(quality.difference)
                assert f"{estimate} ({interval})" in table
        if result.speed.speed_up:
            estimate, interval = wording.speed_up(result.speed.speed_up)
            assert f"{estimate} {interval}" in re.sub(r"×(?=\d)", "× ", table)


def test_runs_show_policy_reason_outcome_error_and_notice(page: Page) -> None:
    runs = page.text[page.text.index("Runs fp32") :]
    for words in ("the reason for bf16-mixed", "fp16-mixed.seed1.jsonl", "error", "can't allocate 8 GB", "train.py:41"):
        assert words in runs


def test_requested_and_effective_policy_are_both_named() -> None:
    page = Page(html.render(*scenarios.single_run()))
    assert "Requested auto, in effect bf16-mixed: the reason for bf16-mixed" in page.text
    assert "of fp32" not in page.text, "there is no baseline whose share could be shown"


def test_figures_have_a_label_and_something_drawn(page: Page) -> None:
    # Losses, times, memory and scale, each for a wide and a narrow page.
    assert page.images == 8
    assert page.source.count("<figcaption>") == 4
    assert all(len(label) > 40 for label in re.findall(r'role="img" aria-label="([^"]*)"', page.source))
    drawings = re.findall(r'<svg [^>]*role="img".*?</svg>', page.source, flags=re.DOTALL)
    for drawing in drawings:
        points = sum(len(re.findall(r"[ML] ", d)) for d in re.findall(r' d="([^"]*)"', drawing))
        assert points > 30


def test_two_optimizers_have_a_loss_figure_each() -> None:
    page = Page(html.render(*scenarios.gan()))
    assert "Training loss, optimizer 0" in page.text
    assert "Training loss, optimizer 1" in page.text
    assert page.images == 2 * 5


def test_what_no_run_has_is_a_sentence_instead_of_a_figure() -> None:
    page = Page(html.render(*scenarios.no_steps()))
    assert page.images == 0
    for sentence in (
        "No run reported a loss",
        "No run has a timed step",
        "No run measured its memory.",
        "No run used loss scaling.",
    ):
        assert sentence in page.text


def test_a_policy_has_one_colour_throughout(page: Page) -> None:
    series = set(re.findall(r"var\((--series-\d+)\)", page.source))
    assert series == {"--series-0", "--series-1", "--series-2"}
    defined = set(re.findall(r"(--[\w-]+):", page.source))
    assert set(re.findall(r"var\((--[\w-]+)\)", page.source)) <= defined
    assert not re.search(r"#0[abc]00[0-9a-f]{2}", page.source), "a reserved colour was left in"


def test_both_themes_define_the_same_colours(page: Page) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", page.source, flags=re.DOTALL)[:2]
    names = [set(re.findall(r"(--[\w-]+):", theme)) for theme in (light, dark)]
    assert names[0] == names[1]


def test_hostile_words_stay_words() -> None:
    records, comparison = scenarios.hostile()
    page = Page(html.render(records, comparison))
    assert page.text.count("</script><script>alert(1)</script>") >= 5
    assert {"b", "i"} & set(page.tags) == {"b"}, "bold is the page's own"
    assert page.source.count("<script") == 1 and page.source.count("</script") == 1


def test_the_same_input_makes_the_same_file() -> None:
    assert html.render(*scenarios.three_policies()) == html.render(*scenarios.three_policies())


def test_long_runs_stay_small() -> None:
    source = html.render(*scenarios.long_runs())
    assert len(source.encode()) < 500_000
    assert "the mean of 834 consecutive steps" in source


def test_matplotlib_keeps_its_settings() -> None:
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    html.render(*scenarios.one_seed())
    assert dict(matplotlib.rcParams) == before
    assert Gcf.figs == {}, "pyplot knows of a figure"


def test_write_replaces_an_older_report_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    html.write(path, *scenarios.one_seed())
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_older_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError):
        html.write(path, *scenarios.one_seed())
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        html.write(tmp_path / "missing" / "report.html", *scenarios.one_seed())
