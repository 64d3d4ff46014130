"""The demo in a real browser: draw, caption, edit, segment, the matrix, and an error that is seen.

Needs gradio, playwright and a Chromium on the PATH (Debian: ``apt-get install chromium``); CI installs all three.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright (the extra [dev])")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"),
]
SOFTWARE_GL = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"]
PATIENCE = 60_000


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dual_loop.cli", "serve", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(server: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_GL)
        page = browser.new_page(viewport={"width": 1240, "height": 1200})
        page.set_default_timeout(PATIENCE)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        page.goto(server, wait_until="domcontentloaded")
        page.wait_for_selector("#editor canvas")
        page.locator(".gallery-item").first.click()
        time.sleep(3)  # the editor draws on a canvas, which says nothing about when it is done
        yield page
        browser.close()


def scribble(page: Any, x: float, y: float, reach: int) -> None:
    """Paint over a square with the brush; positions are shares of the editor."""
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + x * box["width"], box["y"] + y * box["height"]
    page.mouse.move(x - reach, y - reach)
    page.mouse.down()
    for step in range(-reach, reach + 1, 12):
        page.mouse.move(x + (reach if (step // 12) % 2 else -reach) * 0.7, y + step, steps=4)
    page.mouse.up()


def caption_of(page: Any) -> str:
    return str(page.locator("#caption textarea").input_value())


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def test_draw_caption_edit_segment_and_error(page: Any, tmp_path: Path) -> None:
    page.locator("#editor button[aria-label='Brush']").click()
    scribble(page, 0.73, 0.75, 30)  # the heart at the lower right
    time.sleep(1)
    page.locator("#add").click()
    wait_for(lambda: "heart" in caption_of(page), "the caption of the heart")
    wait_for(lambda: "IoU 0." in page.locator("#iou").inner_text(), "the IoU")
    first = float(page.locator("#iou").inner_text().split()[-1])
    assert first > 0.3

    # The cloud at the upper left; a stroke that starts beside the image is none.
    scribble(page, 0.27, 0.27, 15)
    time.sleep(1)
    page.locator("#add").click()
    wait_for(lambda: "cloud" in caption_of(page), "the caption of the cloud")
    wait_for(lambda: page.locator("#matrix td").count() == 4, "a matrix of two by two")
    assert page.locator("#region label").count() == 2

    box = page.locator("#caption textarea")
    box.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("the yellow heart", delay=20)
    wait_for(lambda: "0.000" in page.locator("#iou").inner_text(), "the IoU of a caption that leads elsewhere")
    # The mask follows the typing; the last word comes last.
    last = page.locator("#matrix tr").nth(2)
    wait_for(lambda: last.inner_text().startswith("“the yellow heart”"), "the caption as it was typed")

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(str(broken))
    wait_for(lambda: "Error:" in page.locator("#status").inner_text(), "the error")
    assert "broken.png" in page.locator("#status").inner_text()
    assert page.locator("#region label").count() == 2, "nothing is lost by an error"


def test_nothing_is_loaded_from_elsewhere(page: Any, server: str) -> None:
    assert page.hosts == {server.removeprefix("http://")}
