"""The evidence: runs are valid configurations, captions of every kind are written, intervals and tables are right."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dual_loop.config import add_training_flags, load_config, overrides_from, resolve_config_path
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.masks_dir import MasksDir
from dual_loop.testing.scenes import generate_scene, pool_seed

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from experiments import composition, crossed, evidence, plans  # noqa: E402

RUNS = {f"{run.table}/{run.arm}": run for run in plans.runs_of(list(plans.TABLES)) if run.steps}


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_every_run_is_a_valid_configuration(run: plans.Run, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    args = parser.parse_args(evidence.training_arguments(run, tmp_path))
    config = load_config(resolve_config_path(args.config), overrides_from(args))
    assert (config.train.max_steps, config.train.seed, config.train.learning_rate) == (run.steps, run.seed, run.rate)
    data = config.data
    if run.without_pairs:
        assert (data.masks_max_samples, data.refcoco_dir) == (run.captioned, None)
        assert (data.sa1b_dir is None) == (run.captions == "none")
        return
    assert (data.masks_dir is None) == (run.captions == "none" and not run.everything)
    assert data.refcoco_max_samples == run.captioned


def test_captions_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCENES", "CAPTIONED", "START_SCENES"):
        monkeypatch.setattr(evidence, name, 6)
    folder = evidence.write_scenes(tmp_path, 3, 0.0)
    texts = {}
    for kind in ("written", "true", "constant", "shuffled", "start"):
        source = MasksDir(evidence.write_masks(folder, kind), regions_per_image=9)
        samples = [source.load(index, np.random.default_rng(0)) for index in range(len(source))]
        assert len(samples) == 6
        texts[kind] = [text for sample in samples for text in sample.captions]
    assert set(texts["written"]) == {()}
    assert set(texts["constant"]) == {("the object",)}
    assert sorted(texts["shuffled"]) == sorted(texts["true"]) != texts["true"]
    right = [own == true for own, true in zip(texts["start"], texts["true"], strict=True)]
    assert np.mean(right) > 0.4
    evidence.write_start_scenes(tmp_path)
    assert len(MasksDir(tmp_path / "data" / "start" / "masks.jsonl")) == 6


def test_expressions_ask_for_the_object_that_they_describe(tmp_path: Path) -> None:
    path = tmp_path / "expressions" / "masks.jsonl"
    composition.write_objects(path, "images/{}.jpg", "expressions", 1, 120, composition.asked)
    kinds: dict[str, int] = {}
    for index in range(120):
        scene = generate_scene(pool_seed(1, "expressions", index))
        for kind, item, text in composition.asked(scene):
            kinds[kind] = kinds.get(kind, 0) + 1
            others = [one for one in scene.objects if one.shape == item.shape and one is not item]
            if kind == "negation":
                assert text == f"the {item.shape} that is not {others[0].colour}"
            elif kind == "relation":
                _, shape, *words, _, anchor = text.split()
                [third] = [one for one in scene.objects if one.shape == anchor]
                axis = int(words[0] in ("above", "below"))
                sign = 1 if words[0] in ("right", "below") else -1
                assert shape == item.shape
                assert (
                    sign * (item.centre[axis] - third.centre[axis])
                    > 0
                    > sign * (others[0].centre[axis] - third.centre[axis])
                )
    assert min(kinds[kind] for kind in ("shape", "negation", "relation", "other")) >= 4
    source = MasksDir(path, regions_per_image=99)
    samples = [source.load(index, np.random.default_rng(0)) for index in range(len(source))]
    assert sum(sample.num_regions for sample in samples) == sum(kinds.values())
    assert sum(len(texts) for sample in samples for texts in sample.captions) == sum(kinds.values()) - kinds["other"]


def test_captions_without_pairs_name_none_of_them(tmp_path: Path) -> None:
    scenes = [generate_scene(pool_seed(0, "refcoco/train", index)) for index in range(100)]
    kept = [text for scene in scenes for _, _, text in composition.named(scene)]
    assert not any(composition.names_unnamed_pair(text) for text in kept)
    every = [text for scene in scenes for text in scene.captions]
    dropped = [text for text in every if composition.names_unnamed_pair(text)]
    assert len(kept) + len(dropped) == len(every)
    assert 0.08 < len(dropped) / len(every) < 0.25
    assert len(composition.UNNAMED_CAPTIONS) == 8


def test_numbers_of_expressions_by_kind(tmp_path: Path) -> None:
    masks = np.zeros((3, 8, 8), bool)
    masks[0, :4], masks[1, 4:], masks[2, 4:, :4] = True, True, True
    codes = [encode_rle(mask) for mask in masks]

    def line(name: str, own: int, sentence: str, predicted: int) -> dict[str, object]:
        sentences = [{"text": sentence, "mask": codes[predicted]}] if sentence else []
        common = {"name": name, "image": name.split("#")[0], "target": codes[own], "sentences": sentences}
        return {**common, "references": [sentence], "no_target": {"union": 0 if own else 5}}

    held_out = [line("a#0", 0, "the red star", 0), line("a#1", 1, "the blue flag", 0)]
    expressions = [
        line("b#shape/0", 0, "the star", 1),
        line("b#negation/1", 0, "the star that is not blue", 0),
        line("b#other/2", 1, "", 0),
    ]
    for folder, lines in ((tmp_path, held_out), (tmp_path / "expressions", expressions)):
        folder.mkdir(exist_ok=True)
        (folder / "regions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = evidence.composed(tmp_path)
    assert found["no_target_is_empty"] == [1, 2]
    unnamed = composition.names_unnamed_pair("the red star")
    assert found["groups"]["unnamed pairs" if unnamed else "named pairs"]["picks"] == [1]
    assert found["groups"]["shape"] == {"image": [0], "iou": [0], "picks": [0]}
    assert found["groups"]["negation"] == {"image": [0], "iou": [1000], "picks": [1]}


def test_intervals_draw_seeds_and_images() -> None:
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(0, 3, (6, 1)), rng.normal(0, 3, (1, 200))
    values = 50 + seeds + images + rng.normal(0, 1, (6, 200))
    mean, low, high = crossed.crossed_interval(values, np.ones_like(values))
    assert mean == pytest.approx(values.mean())
    # The seeds decide the width, the images add little.
    assert high - low == pytest.approx(3.92 * seeds.std() / 6**0.5, rel=0.2)
    alone = crossed.crossed_interval(values[:1], np.ones((1, 200)))
    assert alone[2] - alone[1] < 1.5


def test_table_of_results(tmp_path: Path) -> None:
    def write(name: str, value: int) -> None:
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        regions = {"image": [0, 0, 1], "iou": [value] * 3, "picks": [1, 0, 1]}
        path.write_text(json.dumps({"arm": path.stem.split("_")[0], "commit": "abcdef012", "regions": regions}))

    for name, value in (("start", 450), ("core/loop_s0", 600), ("core/loop_s1", 640), ("core/captioned_s0", 500)):
        write(name, value)
    text = crossed.markdown(tmp_path, ["core", "rewards"])
    assert "commits abcdef0" in text
    cells = {line.split("|")[1].strip(): line.split("|")[2:5] for line in text.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in cells["loop"]] == ["2", "62.0 (60.0 to 64.0)", "66.7 (50.0 to 100.0)"]
    assert cells["loop - captioned"][:2] == [" 1 ", " +10.0 (+10.0 to +10.0) "]
    assert cells[f"loop - {crossed.START}"][:2] == [" 2 ", " +17.0 (+15.0 to +19.0) "]
    assert list(cells).index("loop") < list(cells).index("captioned")


def test_the_tables_in_the_docs_are_those_of_the_results() -> None:
    shown = evidence.RESULTS.with_name("tables.md").read_text(encoding="utf-8")
    assert shown == evidence.tables(list(plans.TABLES)) + "\n", "write it anew: evidence.py --print"
