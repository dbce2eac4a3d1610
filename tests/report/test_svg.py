"""matplotlib's SVG made fit for the page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from halfstep.report import svg


def paint(figure, narrow) -> None:
    axes = svg.panel(figure, left=10, top=10, right=10, height=80)
    axes.plot([0, 1, 2], [0, 1.23456, 0], color=svg.looks(["a", "b"])["b"].color, marker="x")
    axes.text(1, 0.5, "1.234567 <b>&", color=svg.TEXT)
    axes.fill_between([0, 1], 0, 1, color=svg.ZONE)


def drawing(name: str = "figure") -> svg.Drawing:
    return svg.draw(name, 'says "<this>"', {svg.WIDE: 100, svg.NARROW: 120}, paint)


def test_both_widths_are_pixels_of_the_page() -> None:
    both = drawing()
    assert 'viewBox="0 0 860 100"' in both.wide
    assert 'viewBox="0 0 390 120"' in both.narrow


def test_it_is_well_formed_and_labelled() -> None:
    root = ElementTree.fromstring(drawing().wide)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'says "<this>"'
    assert "1.234567 <b>&" in [element.text for element in root.iter("text")], "text is text, and is not rounded"


def test_nothing_is_left_that_html_does_not_need() -> None:
    text = drawing().wide
    assert not re.search(r"<\?xml|DOCTYPE|xmlns|metadata|<style|font-family|http", text)


def test_colours_are_variables_of_the_page() -> None:
    text = drawing().wide
    assert "var(--series-1)" in text and "var(--text)" in text and "var(--zone)" in text
    assert not re.search(r"#[0-9a-f]{6}", text)


def test_ids_carry_the_name_and_references_follow() -> None:
    one, two = drawing("one").wide, drawing("two").wide
    ids = {name: set(re.findall(r' id="([^"]*)"', text)) for name, text in (("one", one), ("two", two))}
    assert ids["one"] and not ids["one"] & ids["two"]
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', one)) == ids["one"]


def test_coordinates_have_two_decimals_at_most() -> None:
    for data in re.findall(r' (?:d|x|y|transform)="([^"]*)"', drawing().wide):
        assert not re.search(r"\.\d{3}", data)


def test_policies_are_told_apart_without_colour() -> None:
    names = [f"policy{index}" for index in range(40)]
    looks = svg.looks(names)
    assert len({(look.color, look.dashes) for look in looks.values()}) == 40
    assert len({look.dashes for look in list(looks.values())[:5]}) == 5
    assert looks["policy0"].linestyle == "-"
    assert looks["policy1"].linestyle == (0, (7.0, 3.0))
