"""Clips measured with the embedded model: figures by hand, streaming, answers without [SEG], and no memory weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.exporter import export_weights
from dual_loop.checkpoint.key_rules import ORIGINAL, memory_name
from dual_loop.data.ref_video import Clip, RefVideos
from dual_loop.errors import CheckpointError
from dual_loop.evaluation.clip_meter import ClipMeter, build_tracker
from dual_loop.evaluation.figures import video_figures
from dual_loop.evaluation.measure import MeasuredRegion
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.metrics import boundary_f, iou, mask_overlap
from dual_loop.model.video import SHARED
from dual_loop.serve.loading import LoadedModel, find_trained

from video_sets import FRAMES, scene, write_mevis

PROTOCOL = PRESETS["dual_loop"].of_video(2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return find_trained().load(torch.device("cpu"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return RefVideos("mevis", write_mevis(tmp_path_factory.mktemp("mevis"), 1), "valid_u").load_all(0)


@pytest.fixture
def meter(loaded: LoadedModel, tmp_path: Path) -> ClipMeter:
    tracker = build_tracker(loaded.model, loaded.config, [], is_silent=True)
    return ClipMeter(loaded.model, loaded.prompter, loaded.config, PROTOCOL, tracker, tmp_path)


def test_a_clip_segmented_with_memory(meter: ClipMeter, clip: Clip, capsys: pytest.CaptureFixture[str]) -> None:
    """The first frames are found as single images are (the model knows one of two objects), the others by memory."""
    shown: list[np.ndarray] = []
    join = meter._join

    def watched(logits: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
        shown.append(join(logits, size))
        return shown[-1]

    meter._join = watched  # type: ignore[method-assign]
    found = meter.measure([replace(clip, expressions=clip.expressions[:2])], "mevis:valid_u")
    assert [region.name for region in found] == ["mevis/video0#0", "mevis/video0#1"]
    assert all(region.sentences[0].num_masks == 1 for region in found)
    masks = np.stack(shown).reshape(FRAMES, 2, *shown[0].shape)
    true = [scene(0, number)[1] for number in range(FRAMES)]
    assert all(float(iou(*mask_overlap(masks[k], true[k]))[1]) > 0.6 for k in range(2)), "prompted frames"
    assert all(mask[1].any() for mask in masks[2:]), "frames that memory alone finds"
    true[-1] = np.zeros_like(true[-1])  # the objects are gone there
    for place, region in enumerate(found):
        own = [(float(iou(*mask_overlap(masks[k, place][None], true[k][place][None]))[0])) for k in range(FRAMES)]
        assert region.jaccard == pytest.approx(np.mean(own), abs=1e-12)
        edges = [boundary_f(masks[k, place], true[k][place]) for k in range(FRAMES)]
        assert region.boundary == pytest.approx(np.mean(edges), abs=1e-12)
    again = meter.measure([replace(clip, expressions=clip.expressions[1:2])], "mevis:valid_u")
    assert again[0].jaccard == pytest.approx(found[1].jaccard, abs=1e-3), "what is tracked beside it changes nothing"


def test_perfect_masks_have_j_and_f_of_one(meter: ClipMeter, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = iter(range(FRAMES))

    def true(logits: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
        found = clip.masks(next(frames), clip.expressions[2:], size)
        assert found is not None
        return found[0]

    monkeypatch.setattr(meter, "_join", true)
    [region] = meter.measure([replace(clip, expressions=clip.expressions[2:])], "mevis:valid_u")
    assert (region.jaccard, region.boundary) == (1.0, 1.0), "two objects are one mask, and an empty frame counts 1"


def test_an_answer_without_seg_is_empty_on_every_frame(
    meter: ClipMeter, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dual_loop.loop.scorer.Decoder.write", lambda self, rows: [[5] for _ in rows])
    meter.protocol = replace(PROTOCOL, seg="generated")
    [region] = meter.measure([replace(clip, expressions=clip.expressions[:1])], "mevis:valid_u")
    assert region.sentences[0].num_masks == 0
    assert region.jaccard == region.boundary == pytest.approx(1 / FRAMES), "right on the frame without the object alone"


def test_the_answer_is_written_after_all_prompted_frames(
    meter: ClipMeter, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes: list[Any] = []
    of_image = meter.scorer.prompter.image_prefix
    monkeypatch.setattr(
        meter.scorer.prompter, "image_prefix", lambda *tiles: (prefixes.append(tiles), of_image(*tiles))[1]
    )
    meter.protocol = replace(PROTOCOL, seg="generated", frames=3)
    prompts = meter._prompts(clip, [clip.image(number) for number in range(3)], clip.expressions[:1])
    assert set(prefixes) == {(1, 1, 1)}, "the question, and the row that is read"
    forced = replace(PROTOCOL, frames=3)
    meter.protocol = forced
    [given] = meter._prompts(clip, [clip.image(number) for number in range(3)], clip.expressions[:1])
    assert torch.allclose(prompts[0], given, atol=1e-4), "the embedded model writes the same answer"


def test_figures_by_hand() -> None:
    regions = [MeasuredRegion(f"v#{k}", "v" if k < 2 else "w", sentences=[]) for k in range(3)]
    for region, jaccard, boundary in zip(regions, (0.5, 0.7, 0.9), (0.3, 0.5, 1.0), strict=True):
        region.jaccard, region.boundary = jaccard, boundary
        region.sentences.append(MeasuredRegion.from_json(json.loads(json.dumps(ANSWER))).sentences[0])
    found: Any = video_figures(regions)
    assert found["J"]["value"] == pytest.approx(0.7)
    assert found["F"]["value"] == pytest.approx(0.6)
    assert found["J&F"]["value"] == pytest.approx(0.65)
    assert found["J"]["ci95_low"] == pytest.approx(0.6), "whole videos are drawn"
    assert found["without_mask"]["value"] == 0
    for region in regions:
        region.jaccard = region.boundary = None
    assert "J" not in video_figures(regions)


ANSWER = {
    "name": "v#0",
    "image": "v",
    "sentences": [{"text": "t", "num_masks": 1, "intersection": 1, "union": 2, "mask": {}}],
}


def test_memory_that_no_file_holds(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    first = build_tracker(loaded.model, loaded.config, [])
    assert "157 tensors of SAM 2's video memory are in no file and drawn" in capsys.readouterr().err
    again = build_tracker(loaded.model, loaded.config, [], is_silent=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)), "by the seed"
    real = replace(loaded.config, model=replace(loaded.config.model, tokenizer=None))
    with pytest.raises(CheckpointError, match=r"no video memory.*157 tensors.*--sam2_path"):
        build_tracker(loaded.model, real, [])


def test_memory_comes_from_the_weights_that_the_model_starts_from(
    loaded: LoadedModel, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Sa2VA's names in a whole checkpoint, and by transformers' in a folder of SAM 2."""
    drawn = build_tracker(loaded.model, loaded.config, [], is_silent=True)
    native = {name: tensor for name, tensor in drawn.state_dict().items() if not name.startswith(SHARED)}
    keys = json.loads((golden / "sa2va_4b_keys.json").read_text())["keys"]
    video = {name: native[target] for name in keys if (target := memory_name(name, ORIGINAL))}
    parts = (loaded.config, loaded.prompter.tokenizer)
    export_weights(loaded.model, tmp_path / "sa2va.pth", "original", *parts, video=video)
    sam2 = {name: tensor.clone() for name, tensor in loaded.model.grounding_encoder.state_dict().items()}
    save_file({**sam2, **native}, tmp_path / "sam2.safetensors")
    changed = replace(loaded.config, train=replace(loaded.config.train, sam2_path=str(tmp_path / "sam2.safetensors")))
    for config, sources in ((loaded.config, [tmp_path / "sa2va.pth"]), (changed, [])):
        tracker = build_tracker(loaded.model, config, sources)
        assert "157 tensors of SAM 2's video memory are loaded" in capsys.readouterr().err
        assert all(torch.equal(value, native[name]) for name, value in tracker.state_dict().items() if name in native)
