"""What the page asks and gets, without a browser: objects, captions, masks, mask files, errors, the port."""

from __future__ import annotations

import base64
import io
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.errors import DualLoopError, EnvironmentProblem, SampleError
from dual_loop.metrics import iou, mask_overlap
from dual_loop.serve import demo_app
from dual_loop.serve.demo_app import MAX_REGIONS, SIDE, Answers, PageServer
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

SCENE = generate_scene(1003)
MASKS = [np.asarray(mask) for mask in SCENE.masks]


def url(pixels: np.ndarray, kind: str = "PNG") -> str:
    """Write pixels as the page does: masks as black and white in colours."""
    image, stream = Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels), io.BytesIO()
    image.convert("RGB").save(stream, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()


def mask_of(answer: str) -> np.ndarray:
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.partition(",")[2]))))
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(iou(*mask_overlap(first[None], second[None]))[0])


IMAGE = url(SCENE.image)


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers(Predictor.load(device="cpu"))


def test_masks_are_captioned_and_segmented(answers: Answers) -> None:
    regions = answers.loop({"image": IMAGE, "masks": [url(mask) for mask in MASKS]})["regions"]
    assert [region["caption"] for region in regions] == list(SCENE.captions)
    assert [region["rejected"] for region in regions] == [None] * len(MASKS)
    assert min(overlap(mask_of(one["mask"]), mask) for one, mask in zip(regions, MASKS, strict=True)) > 0.5


def test_text_needs_no_region(answers: Answers) -> None:
    found = answers.segment({"image": IMAGE, "text": SCENE.captions[1]})
    assert overlap(mask_of(found["mask"]), MASKS[1]) > 0.5
    assert found["pixels"] == mask_of(found["mask"]).sum()


def test_points_and_boxes_mark_objects(answers: Answers) -> None:
    rows, columns = np.nonzero(MASKS[1])
    found = answers.region({"image": IMAGE, "point": [columns.mean(), rows.mean()]})
    assert overlap(mask_of(found["mask"]), MASKS[1]) > 0.5
    assert not answers.knows_boxes, "the tiny model's SAM 2 has not learned them"
    assert mask_of(answers.region({"image": IMAGE, "box": [10, 20, 30, 25]})["mask"]).sum() == 100


def test_a_box_is_refined_where_sam_2_knows_boxes() -> None:
    asked: list[object] = []

    def region_from_box(image: np.ndarray, box: list[int], refine: bool) -> np.ndarray:
        asked.extend([image.shape, box, refine])
        return MASKS[0]

    model = SimpleNamespace(loaded=SimpleNamespace(is_tiny=False), region_from_box=region_from_box)
    found = Answers(model).region({"image": IMAGE, "box": [10, 20, 30, 25]})
    assert np.array_equal(mask_of(found["mask"]), MASKS[0])
    assert asked == [SCENE.image.shape, [10, 20, 30, 25], True]


def test_mask_files_come_back_at_a_bounded_size(answers: Answers) -> None:
    labels = np.zeros((1500, 2 * SIDE), np.uint8)
    labels[:700, :SIDE], labels[700:, :SIDE] = 1, 2
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, "PNG")
    asked = {"name": "../m.png", "data": base64.b64encode(stream.getvalue()).decode(), "width": 2 * SIDE}
    found = answers.masks({**asked, "height": 1500})["masks"]
    assert [one["name"] for one in found] == ["m#1", "m#2"]
    assert [mask_of(one["mask"]).shape for one in found] == [(750, SIDE)] * 2
    assert [mask_of(one["mask"]).sum() for one in found] == [350 * SIDE // 2, 400 * SIDE // 2]
    with pytest.raises(SampleError, match=r"differ in size; where: m\.png"):
        answers.masks({**asked, "height": 1501})
    stream = io.BytesIO()
    Image.fromarray(np.arange(1, 10, dtype=np.uint8).reshape(3, 3).repeat(9, 0).repeat(9, 1)).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    with pytest.raises(SampleError, match=r"too many regions; where: n\.png; seen: 9"):
        answers.masks({"name": "n.png", "data": data, "width": 27, "height": 27})
    with pytest.raises(SampleError, match=r"mask file cannot be used; where: m\.png"):
        answers.masks({**asked, "data": base64.b64encode(b"\x89PNG nothing").decode()})


LARGE = url(np.zeros((SIDE + 1, SIDE, 3), np.uint8), "JPEG")


@pytest.mark.parametrize(
    ("question", "asked", "text"),
    [
        ("loop", {"masks": [url(MASKS[0])]}, "no image is open"),
        ("loop", {"image": IMAGE}, "not that many regions"),
        ("loop", {"image": IMAGE, "masks": []}, "not that many regions"),
        ("loop", {"image": IMAGE, "masks": [url(MASKS[0])] * (MAX_REGIONS + 1)}, "not that many regions"),
        ("loop", {"image": IMAGE, "masks": [url(MASKS[0]), url(MASKS[0][1:])]}, "differ in size"),
        ("loop", {"image": IMAGE, "masks": [url(MASKS[0] & False)]}, "a mask is empty"),
        ("loop", {"image": IMAGE, "masks": [7]}, "damaged"),
        ("loop", {"image": "data:,%", "masks": [url(MASKS[0])]}, "did not arrive"),
        ("loop", {"image": LARGE, "masks": [url(MASKS[0])]}, "too large"),
        ("segment", {"image": IMAGE, "text": " "}, "an empty text"),
        ("segment", {"image": IMAGE, "text": ["a"]}, "an empty text"),
        ("segment", {"image": IMAGE, "text": "[SEG]"}, "special token"),
        ("region", {"image": IMAGE}, "not the right numbers"),
        ("region", {"image": IMAGE, "point": "ab"}, "not the right numbers"),
        ("region", {"image": IMAGE, "point": [float("nan"), 3]}, "outside its image"),
        ("region", {"image": IMAGE, "point": [-1, 3]}, "outside its image"),
        ("region", {"image": IMAGE, "box": [5, 5, 5, 9]}, "does not fit"),
    ],
)
def test_errors_say_what_is_wrong(answers: Answers, question: str, asked: dict, text: str) -> None:
    with pytest.raises(DualLoopError, match=text):
        getattr(answers, question)(asked)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_app.Predictor, "load", lambda *a, **b: pytest.fail("the model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match="--port"):
            PageServer("127.0.0.1", port)
        assert main(["serve", "--port", str(port)]) == 2
        assert capsys.readouterr().err.count("error:") == 1
    assert main(["serve", "--port", "70000"]) == 2
    assert "cannot listen" in capsys.readouterr().err
