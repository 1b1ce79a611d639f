"""The pages in a real browser: what is drawn, where, and what its controls do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from viewer_run import ODD, Run

from wsiseg.outputs.run_folder import read_run
from wsiseg.slides import open_slide
from wsiseg.viewer.report import write_report
from wsiseg.viewer.server import Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(autouse=True)
def no_complaints(browser: Browser) -> Iterator[None]:
    browser.complaints.clear()
    yield
    assert browser.complaints == []


def show(browser: Browser, server: Server, place: str = "") -> None:
    browser.open("about:blank")
    browser.open(f"{server.url}slides/0/{place}")
    browser.wait("document.body?.dataset.state === 'idle'")
    browser.settled()


def view(browser: Browser) -> np.ndarray[Any, Any]:
    """The part of the screen at level 0 that the mask covers; see PLACE."""
    return browser.screenshot()[200:500, 200:700].astype(int)


# One screen pixel a level-0 pixel: (LEFT, TOP) of the slide is in the corner of the canvas, which
# has 900 x 800 px.
PLACE = "#x=650&y=550&scale=1"
LEFT, TOP = 200, 150


def expected(run: Run, opacity: float) -> np.ndarray[Any, Any]:
    """What `view` must show: glands in green over the slide."""
    with open_slide(run.slides / "below" / "a.tif") as slide:
        grid = slide.grid(slide.mpp)
        pixels = slide.read(grid.box, grid).astype(float)
    gland = np.repeat(np.repeat(run.labels == 2, 2, 0), 2, 1)[..., None]
    mixed = np.where(gland, (1 - opacity) * pixels + opacity * np.array([0, 160, 0]), pixels)
    x, y = LEFT + 200, TOP + 200
    return mixed[y : y + 300, x : x + 500]


def test_the_mask_lies_over_the_slide(browser: Browser, server: Server, made_run: Run) -> None:
    show(browser, server, PLACE)
    drawn, wanted = view(browser), expected(made_run, 0.45)
    right = np.abs(drawn - wanted).mean()
    assert right < 5
    plain = expected(made_run, 0.0)
    shifted = np.abs(np.roll(drawn, 6, 1) - wanted)[:, 10:].mean()
    assert right < 0.5 * np.abs(drawn - plain).mean()
    assert right < 0.5 * shifted


def test_opacity_switch_and_classes(browser: Browser, server: Server, made_run: Run) -> None:
    show(browser, server, PLACE)
    plain = expected(made_run, 0.0)
    browser.run(
        "(o => { o.value = 90; o.dispatchEvent(new Event('input')); })"
        "(document.getElementById('opacity'))"
    )
    browser.settled()
    assert np.abs(view(browser) - expected(made_run, 0.9)).mean() < 5
    browser.run("document.getElementById('class-2').click()")
    browser.settled()
    assert np.abs(view(browser) - plain).mean() < 5
    browser.run("document.getElementById('class-2').click()")
    browser.run("document.getElementById('mask').click()")
    browser.settled()
    assert np.abs(view(browser) - plain).mean() < 5
    browser.run("document.getElementById('mask').click()")
    browser.run("document.querySelector('[value=outline]').click()")
    browser.settled()
    green = (np.abs(view(browser) - [0, 160, 0]).max(-1) < 30).mean()
    gland = (np.abs(expected(made_run, 1.0) - [0, 160, 0]).max(-1) < 30).mean()
    assert 0.002 < green < 0.5 * gland


def test_pointer_scale_bar_and_zoom(browser: Browser, server: Server, made_run: Run) -> None:
    show(browser, server, PLACE)
    names = {0: "not analysed", 1: "Stroma <i>", 2: "Gland"}
    for x, y in ((300, 300), (420, 350), (500, 200), (600, 450), (120, 640)):
        browser.mouse("mouseMoved", x, y)
        text = browser.run("document.getElementById('place').textContent")
        at = LEFT + x, TOP + y
        assert (
            text
            == f"{names[int(made_run.labels[at[1] // 2, at[0] // 2])]}   x {at[0]}  y {at[1]} px"
        )
    bar = "[document.getElementById('bar-text').textContent, "
    bar += "document.getElementById('bar-line').getBoundingClientRect().width]"
    assert browser.run(bar) == ["50 µm", 100]  # at 0.5 um per pixel
    browser.mouse("mouseWheel", 420, 350, deltaX=0, deltaY=-300)
    browser.settled()
    assert browser.run(bar) == ["20 µm", 80]
    browser.mouse("mouseMoved", 420, 350)
    moved = browser.run("document.getElementById('place').textContent")
    assert moved.endswith(f"x {LEFT + 420}  y {TOP + 350} px")


def test_dragging_moves_the_slide_with_the_pointer(browser: Browser, server: Server) -> None:
    show(browser, server, PLACE)
    before = view(browser)
    browser.mouse("mousePressed", 400, 400, button="left", clickCount=1)
    browser.mouse("mouseMoved", 440, 425, button="left", buttons=1)
    browser.mouse("mouseReleased", 440, 425, button="left", clickCount=1)
    browser.settled()
    after = view(browser)
    assert np.abs(after[25:, 40:] - before[:-25, :-40]).mean() < 1
    assert np.abs(after - before).mean() > 5


def test_the_served_report_leads_to_the_slides(browser: Browser, server: Server) -> None:
    browser.open(server.url)
    loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 300)"
    browser.wait(f"document.images.length === 2 && {loaded}")
    browser.run("document.querySelectorAll('.name a')[1].click()")
    browser.wait("document.body?.dataset.state === 'idle'")
    name = "document.getElementById('name').textContent"
    assert browser.run(name) == f"{ODD}.tif"
    assert browser.run("document.getElementById('problems').textContent") == ""


def test_the_report_sorts_and_finds(browser: Browser, made_run: Run, tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", made_run.out, read_run(made_run.out))
    browser.open((tmp_path / "r.html").as_uri())
    browser.wait("document.readyState === 'complete' && !!document.getElementById('find')")
    names = (
        "[...document.querySelectorAll('tbody tr:not([hidden]) .name')].map(c => c.dataset.v[0])"
    )
    click = "document.querySelectorAll('thead button')[{}].click()"
    assert browser.run(names) == ["a", "b"]
    browser.run(click.format(0))
    browser.run(click.format(0))
    assert browser.run(names) == ["b", "a"]
    browser.run(
        "(f => { f.value = 'A.TIF'; f.dispatchEvent(new Event('input')); })"
        "(document.getElementById('find'))"
    )
    assert browser.run(names) == ["a"]
    widths = "[...document.images].map(i => i.complete && i.naturalWidth)"
    assert min(browser.run(widths)) > 300
    assert browser.screenshot().std() > 10
