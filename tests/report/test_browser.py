"""The comparison's page in headless Chromium: renders, says nothing, asks for nothing, and fits a phone."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from moequant.report.compare_page import write
from tests.clients import browser
from tests.report.test_compare_page import found

PHONE, DESK = 390, 1280


@pytest.fixture(scope="module", autouse=True)
def works(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where there is no Chromium, or a system library that it needs is missing."""
    if not (find_spec("PySide6") and find_spec("PySide6.QtWebEngineCore")):
        pytest.skip("PySide6-WebEngine is not installed")
    blank = tmp_path_factory.mktemp("blank") / "blank.html"
    blank.write_text("<!doctype html><title>blank</title>")
    try:
        assert browser.look(blank, DESK)["title"] == "blank"
    except RuntimeError as error:
        pytest.skip(f"Chromium does not run here: {error}")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "compare.html"
    write(found(layers=5, experts=16, domains=("prose", "code", "a rather long name of a domain")), path)
    return path


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_renders(page: Path, width: int, dark: bool) -> None:
    seen = browser.look(page, width, dark)
    assert seen["console"] == [] and seen["asked"] == []
    assert seen["title"] == "model: 2 compared" and seen["width"] == width
    assert seen["scroll_width"] == width and seen["out"] == [], "no scrolling from side to side"
    assert len(seen["pictures"]) == 5 and all(min(size) > 90 for size in seen["pictures"])
    tokens, *errors, moved = seen["tips"][:5]
    assert tokens == "layer 0, expert 0: 0 tokens, 0 times the fair share"
    assert all(re.match(r"layer 0, expert 0: relative error 1\.\d+ %, [\d.]+ times", tip) for tip in errors)
    assert moved == "layer 0, expert 0: no tokens"
    ink, back = brightness(seen["ink"]), brightness(seen["background"])
    assert (ink > back) == dark and abs(ink - back) > 150
    assert seen["ink"] in seen["inks"], "words in pictures are in the ink of the page"


@pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (DESK, False)])
def test_a_large_model_renders(width: int, dark: bool, tmp_path: Path) -> None:
    """94 layers of 256 experts: on a phone the maps scroll, the page does not."""
    path = tmp_path / "large.html"
    write(found(layers=94, experts=256), path)
    seen = browser.look(path, width, dark)
    assert seen["console"] == [] and seen["asked"] == [] and seen["out"] == []
    assert seen["scroll_width"] == width and len(seen["tips"]) == 9 and all(seen["tips"])


def test_a_bad_page_is_found_out(tmp_path: Path) -> None:
    """The browser sees what it is there to see."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>bad</title><p>long</p><div style='width:2000px'>wide</div>"
        "<img src='http://127.0.0.1:1/absent.png'><script>undefined.nothing</script>"
    )
    seen = browser.look(page, PHONE)
    assert seen["scroll_width"] > 2000 and any("DIV: wide" in one for one in seen["out"])
    assert any("nothing" in one for one in seen["console"])
    assert seen["asked"] == ["http://127.0.0.1:1/absent.png"]


def test_a_picture_of_the_page_is_not_blank(page: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    browser.look(page, DESK, picture=picture)
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[1] == DESK and 0.02 < float((pixels < 0.9).any(2).mean()) < 0.9
