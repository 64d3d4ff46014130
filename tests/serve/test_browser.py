"""The page in a real browser: marks, words, downloads, steps back, errors, large photographs, a phone, keys.

Needs playwright and a Chromium on the PATH (Debian: ``apt-get install chromium``); CI installs both.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.data.masks_dir import read_mask_file

sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright (the extra [dev])")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"),
]
PATIENCE = 60.0
CLOUD, HEART = (0.3, 0.17), (0.77, 0.8)
"""Where the two objects of the first example are, as shares of its sides."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "dual_loop.cli", "serve", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    page = browser.new_page(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    page.set_default_timeout(1000 * PATIENCE)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((address, "data:", "blob:")) else faults.append(one.url))
    page.goto(address)
    wait(page, "example 1")
    yield page
    page.close()
    assert faults == [], "the page's own errors, and what it asked of others"


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def wait(page: Any, words: str) -> None:
    """Wait until the line at the bottom says ``words``; it says what happened last."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(words, text := page.inner_text("#status")):
        assert time.monotonic() < deadline, f"waited in vain for {words!r}: {text}"
        time.sleep(0.02)


def spot(page: Any, share: tuple[float, float]) -> tuple[float, float]:
    box = page.locator("#canvas").bounding_box()
    return box["x"] + share[0] * box["width"], box["y"] + share[1] * box["height"]


def click(page: Any, share: tuple[float, float]) -> None:
    page.mouse.click(*spot(page, share))
    wait(page, "^Marked")


def drag(page: Any, *shares: tuple[float, float]) -> None:
    places = [spot(page, share) for share in shares]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def describe(page: Any) -> float:
    """Describe what is marked; return the IoU."""
    page.click("#describe")
    wait(page, "^(Described|Error)")
    assert page.locator("#status.error").count() == 0, page.inner_text("#status")
    return float(page.inner_text("#iou").split()[1])


def saved(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def pixels(page: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")).astype(int)


def test_click_box_and_brush_mark_objects_that_stay_visible(page: Any) -> None:
    before = pixels(page)
    click(page, CLOUD)
    change = np.abs(pixels(page) - before).max(axis=2)
    assert 0.02 < (change > 20).mean() < 0.2, "the object is tinted, and nothing else"
    row, column = (int(share * side) for share, side in zip(CLOUD[::-1], change.shape, strict=True))
    assert 20 < change[row, column] < 130, "it shows through"
    assert describe(page) > 0.5
    assert "cloud" in page.input_value("#caption")

    page.click("#box")
    drag(page, (0.6, 0.62), (0.95, 0.98))
    wait(page, "^Marked")
    describe(page)  # a box is not what the tiny model learned from

    page.click("#brush")
    drag(page, (0.1, 0.24), (0.35, 0.1), (0.35, 0.2), (0.15, 0.24))
    describe(page)
    assert page.locator("#list button").count() == 3
    assert page.locator("#matrix td").count() == 9


def test_words_first_then_an_edit_and_steps_back(page: Any) -> None:
    page.fill("#text", "the yellow heart")
    page.keyboard.press("Enter")
    wait(page, "^Found")
    assert page.inner_text("#iou") == "found"
    click(page, CLOUD)
    assert describe(page) > 0.5
    box = page.locator("#caption")
    box.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("the yellow heart", delay=20)
    wait(page, "mask follows the caption")
    assert page.inner_text("#iou") == "IoU 0.000"
    assert page.locator("#matrix tr").nth(2).inner_text().startswith("“the yellow heart”")
    page.click("#undo")
    assert "cloud" in box.input_value()
    assert float(page.inner_text("#iou").split()[1]) > 0.5
    for left in (1, 1, 0):  # the description, the mark, the words
        page.click("#undo")
        assert page.locator("#list button").count() == left
    assert page.is_disabled("#undo")


def test_an_error_goes_when_the_next_call_succeeds(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    for box, words in (("#masks", "Error: .*broken.png"), ("#open", "Error: broken.png is no picture")):
        page.set_input_files(box, tmp_path / "broken.png")
        wait(page, words)
        assert page.locator("#status.error").count() == 1
    page.fill("#text", "the [SEG]")
    page.click("#find button")
    wait(page, "Error: .*special token")
    click(page, CLOUD)
    assert page.locator("#status.error").count() == 0


def test_what_is_downloaded_is_what_was_found(page: Any, tmp_path: Path) -> None:
    click(page, CLOUD)
    describe(page)
    given, back = saved(page, "#save_given", tmp_path), saved(page, "#save_back", tmp_path)
    assert given.name == "example 1_region_1_given.png"
    [(_, mask)] = read_mask_file(given)
    assert mask.shape == (144, 160)
    caption = page.input_value("#caption")
    assert saved(page, "#save_caption", tmp_path).read_text() == caption + "\n"
    everything = json.loads(saved(page, "#save_json", tmp_path).read_text())
    assert (everything["width"], everything["height"]) == (160, 144)
    [region] = everything["regions"]
    assert region["caption"] == caption
    [(_, other)] = read_mask_file(back)
    assert region["iou"] == round(float((mask & other).sum() / (mask | other).sum()), 4) == region["iou_with_each"][0]
    page.click("#clear")
    page.set_input_files("#masks", given)  # and comes back as a region
    wait(page, "^Described")
    assert page.inner_text("#list button") == f"1: {given.stem}"
    assert page.input_value("#caption") == caption


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A photograph of 12 megapixels that lies on its side, and the same one small."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(60, 200, (30, 40, 3), np.uint8)).resize((4000, 3000))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "large.jpg", exif=exif)
    noise.resize((640, 480)).save(folder / "small.jpg", exif=exif)
    return {name: folder / f"{name}.jpg" for name in ("small", "large")}


def test_a_large_photograph_is_answered_like_a_small_one(
    page: Any, photographs: dict[str, Path], tmp_path: Path
) -> None:
    page.click("#brush")
    seconds: dict[str, list[float]] = {name: [] for name in photographs}
    for name in ("small", "large") * 3:
        page.set_input_files("#open", photographs[name])
        wait(page, f"{name}.jpg: {'3000 × 4000' if name == 'large' else '480 × 640'}")
        drag(page, (0.3, 0.5), (0.7, 0.5))
        started = time.monotonic()
        describe(page)
        seconds[name].append(time.monotonic() - started)
    print({name: [round(value, 2) for value in values] for name, values in seconds.items()})
    assert min(seconds["large"]) < 2 * min(seconds["small"]) + 0.5, seconds
    with Image.open(saved(page, "#save_given", tmp_path)) as mask:
        assert mask.size == (3000, 4000), "at the photograph's own size"


def test_the_brush_is_as_wide_as_the_picture_needs(page: Any, photographs: dict[str, Path], tmp_path: Path) -> None:
    page.set_input_files("#open", photographs["large"])
    wait(page, "large.jpg")
    page.click("#brush")
    shares = []
    for width in (0, 100):
        page.locator("#width").fill(str(width))
        page.mouse.click(*spot(page, (0.5, 0.5)))
        describe(page)
        with Image.open(saved(page, "#save_given", tmp_path)) as mask:
            shares.append((np.asarray(mask.convert("L")) > 0).mean())
    assert 0 < shares[0] < 1e-4
    assert shares[1] > 0.2


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_phone_shows_the_result_and_nothing_jumps(page: Any) -> None:
    def layout() -> list[list[int]]:
        script = "(names) => names.map((name) => { const box = document.getElementById(name).getBoundingClientRect();"
        script += " return [box.top + scrollY, box.width, box.height].map(Math.round); })"
        found: list[list[int]] = page.evaluate(script, ["stage", "describe", "find", "caption", "pair"])
        return found

    def is_in_sight(name: str) -> bool:
        box, room = page.locator(name).bounding_box(), 844 - page.locator("#status").bounding_box()["height"]
        return bool(box["y"] >= 0 and box["y"] + box["height"] <= room)

    first = layout()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert is_in_sight("#canvas")
    assert is_in_sight("#describe")
    page.touchscreen.tap(*spot(page, CLOUD))
    wait(page, "^Marked")
    assert layout() == first
    page.click("#brush")
    assert layout() == first
    describe(page)
    time.sleep(1)  # it glides
    assert layout() == first
    assert all(map(is_in_sight, ("#caption", "#iou", "#pair")))
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(
    ("page", "is_dark"), [({"color_scheme": "light"}, False), ({"color_scheme": "dark"}, True)], indirect=["page"]
)
def test_light_and_dark_as_the_reader_likes(page: Any, is_dark: bool) -> None:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour))) < 150) is is_dark


def test_all_of_it_by_keyboard(page: Any) -> None:
    page.keyboard.press("b")
    assert page.get_attribute("#brush", "aria-pressed") == "true"
    page.keyboard.press("c")
    page.focus("#stage")
    for key in ["ArrowLeft"] * 2 + ["ArrowUp"] * 3:
        page.keyboard.press(f"Shift+{key}")
    page.keyboard.press("Space")
    wait(page, "^Marked")
    page.keyboard.press("Enter")
    wait(page, "^Described")
    assert "cloud" in page.input_value("#caption")
    page.keyboard.press("x")
    for keys in (["ArrowRight"] * 3 + ["ArrowDown"] * 4, ["ArrowRight", "ArrowDown"]):
        for key in keys:
            page.keyboard.press(f"Shift+{key}")
        page.keyboard.press("Space")
    wait(page, "^Marked")
    page.keyboard.press("Control+z")
    wait(page, "step back")
    assert page.is_disabled("#describe")
    page.keyboard.press("t")
    page.keyboard.type("the yellow heart")
    page.keyboard.press("Enter")
    wait(page, "^Found")
    page.focus("#stage")
    page.keyboard.press("1")
    assert "cloud" in page.input_value("#caption")


def test_the_tiny_model_says_what_it_knows(page: Any) -> None:
    assert "generated symbols only" in page.inner_text("#note")
    page.click("#box")
    assert "has not learned boxes" in page.inner_text("#hint")
    assert page.locator("h2 b").all_inner_texts() == ["1", "2", "3"]
