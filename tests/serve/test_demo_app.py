"""The demo without a browser: regions, edits, the matrix, errors, the port."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.errors import DualLoopError, EnvironmentProblem, SampleError
from dual_loop.serve.demo_app import (
    MAX_REGIONS,
    DemoLogic,
    DemoPage,
    Session,
    check_port,
    import_gradio,
    matrix_html,
    pictures,
    read_drawing,
    read_uploads,
)
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

SCENE = generate_scene(1003)
MASKS = [np.asarray(mask) for mask in SCENE.masks]


@pytest.fixture(scope="module")
def logic() -> DemoLogic:
    return DemoLogic(Predictor.load(device="cpu"))


def test_regions_add_up_and_edits_move_the_mask(logic: DemoLogic) -> None:
    session = logic.add_regions(Session(), SCENE.image, [("", MASKS[0])])
    # An encoder in the browser may change pixels a little; the image stays the same.
    shaken = np.clip(SCENE.image.astype(int) + 2, 0, 255).astype(np.uint8)
    session = logic.add_regions(session, shaken, [("b", MASKS[1])])
    assert [region.name for region in session.regions] == ["region 1", "2: b"]
    assert [region.caption for region in session.regions] == list(SCENE.captions)
    assert np.array_equal(session.image, SCENE.image)
    matrix = session.matrix()
    assert matrix.diagonal().min() > 0.5
    assert matrix[0, 1] < 0.2
    edited = logic.edit(session, 0, SCENE.captions[1])
    assert edited.matrix()[0, 0] < 0.2
    assert edited.matrix()[0, 1] > 0.5
    assert [region.caption for region in session.regions] == list(SCENE.captions), "sessions are not changed in place"
    assert not logic.edit(session, 0, "  ").regions[0].back.any()
    other = logic.add_regions(
        session, generate_scene(1002).image, [("", np.ones(generate_scene(1002).image.shape[:2]) > 0)]
    )
    assert len(other.regions) == 1, "another image starts anew"


def test_strokes_become_regions_one_after_another(logic: DemoLogic) -> None:
    session = logic.add_drawing(Session(), SCENE.image, MASKS[0])
    session = logic.add_drawing(session, SCENE.image, MASKS[0] | MASKS[1])
    assert np.array_equal(session.regions[1].mask, MASKS[1] & ~MASKS[0])
    with pytest.raises(SampleError, match="no region is marked"):
        logic.add_drawing(session, SCENE.image, MASKS[0] | MASKS[1])
    # The strokes were wiped and a whole was drawn over its part.
    whole = np.zeros_like(MASKS[0])
    whole[10:60, 10:60] = True
    assert np.array_equal(logic.add_drawing(session, SCENE.image, whole).regions[-1].mask, whole)
    with pytest.raises(SampleError, match="no image is open"):
        logic.add_drawing(session, None, None)


def test_what_is_shown(logic: DemoLogic) -> None:
    session = logic.add_regions(Session(), SCENE.image, [("<b>", MASKS[0])])
    given, back, iou = pictures(session, 0)
    assert given.shape == back.shape
    assert iou.startswith("IoU 0.")
    table = matrix_html(session)
    assert "&lt;b&gt;" in table
    assert "<b>" not in table
    assert pictures(Session(), 0) == (None, None, "")
    assert matrix_html(Session()) == ""


def test_errors(logic: DemoLogic, tmp_path: Path) -> None:
    cases = [
        (None, [("", MASKS[0])], "no image is open"),
        (SCENE.image, [], "no region is marked"),
        (SCENE.image, [("m", np.ones((3, 3), bool))], "differ in size"),
        (SCENE.image, [("", MASKS[0])] * (MAX_REGIONS + 1), "too many regions"),
    ]
    for image, regions, text in cases:
        with pytest.raises(SampleError, match=text):
            logic.add_regions(Session(), image, regions)
    with pytest.raises(SampleError, match="no region is chosen"):
        logic.edit(Session(), 0, "x")
    session = logic.add_regions(Session(), SCENE.image, [("", MASKS[0])])
    with pytest.raises(DualLoopError, match="special token"):
        logic.edit(session, 0, "[SEG]")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(SampleError, match=r"where: broken\.png") as caught:
        read_uploads([str(tmp_path / "broken.png")])
    assert str(tmp_path) not in str(caught.value)


def test_reading_what_was_drawn(tmp_path: Path) -> None:
    layer = np.zeros((*SCENE.image.shape[:2], 4), np.uint8)
    assert read_drawing(None) == (None, None)
    background = np.dstack([SCENE.image, np.full(SCENE.image.shape[:2], 255, np.uint8)])
    image, mask = read_drawing({"background": background, "layers": [layer]})
    assert np.array_equal(image, SCENE.image)
    assert mask is None
    layer[3:6, 4:9, 3] = 200
    _, mask = read_drawing({"background": background, "layers": [layer]})
    assert mask is not None
    assert mask.sum() == 15
    Image.fromarray(MASKS[0].astype(np.uint8) * 255).save(tmp_path / "m.png")
    [(name, mask)] = read_uploads([str(tmp_path / "m.png")])
    assert name == "m"
    assert np.array_equal(mask, MASKS[0])


def test_a_port_in_use_and_a_missing_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match="--port"):
            check_port("127.0.0.1", port)
        pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
        assert main(["serve", "--port", str(port)]) == 2
        assert capsys.readouterr().err.count("error:") == 1
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EnvironmentProblem, match=r"dual-loop\[demo\]"):
        import_gradio()


def test_the_pages_own_answers(logic: DemoLogic) -> None:
    pytest.importorskip("gradio", reason="the demo needs gradio (the extra [demo])")
    page = DemoPage(import_gradio(), logic.predictor, "tiny")
    background = np.dstack([SCENE.image, np.full(SCENE.image.shape[:2], 255, np.uint8)])
    layer = np.zeros((*SCENE.image.shape[:2], 4), np.uint8)
    layer[MASKS[0], 3] = 255
    session, text, _, caption, score, *_ = page.on_add(Session(), {"background": background, "layers": [layer]})
    assert text.startswith("Draw the next region")
    assert caption == SCENE.captions[0]
    assert float(score.split()[-1]) > 0.5
    assert page.on_choose(session, "region 1")[:2] == [caption, score]
    edited, _, score, *_ = page.on_edit(session, "region 1", SCENE.captions[1])
    assert float(score.split()[-1]) < 0.2
    assert edited.regions[0].caption == SCENE.captions[1]
    assert page.on_edit(session, "region 1", "[SEG]")[1].startswith("**Error:**")
    kept, text, *_ = page.on_add(session, None)
    assert text == "**Error:** no image is open; to do: open one, or choose an example"
    assert kept is session, "nothing is lost by an error"
