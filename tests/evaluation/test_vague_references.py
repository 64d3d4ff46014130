"""References that say less than the model: told from exact ones on generated data, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dual_loop.data.refcoco import RefCoco
from dual_loop.evaluation.measure import MeasuredRegion, RegionMeter, SegmentedCaption, SegmentedSentence
from dual_loop.evaluation.vague_references import (
    REGIONS,
    HeardRegion,
    captioned_samples,
    heard_regions,
    warn_of_vague_references,
)
from dual_loop.serve.loading import find_trained
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.train_dual_loop import main
from dual_loop.types import RegionSample

NUM_IMAGES = 70


def demo(root: Path, vague_share: float) -> RefCoco:
    write_demo_data(root, 1, 0, sources=("refcoco",), num_refcoco=NUM_IMAGES, num_val=1, vague_share=vague_share)
    return RefCoco(root / "ref_seg", datasets=("refcoco",), regions_per_image=4, index_dir=root / "index")


@pytest.mark.slow
@pytest.mark.parametrize("vague_share", [0.0, 0.5])
def test_vague_references_are_told_from_exact_ones(tmp_path: Path, vague_share: float) -> None:
    loaded = find_trained(None).load(torch.device("cpu"))
    meter = RegionMeter(loaded.model, loaded.prompter, loaded.config, tasks=("referring", "loop"))
    heard = heard_regions(meter.measure(captioned_samples([demo(tmp_path, vague_share)], 4), "train"))
    assert REGIONS <= len(heard) < REGIONS + 4
    share = sum(region.reference is not None for region in heard) / len(heard)
    assert (share > 0.4) == (vague_share > 0)
    warning = warn_of_vague_references(heard)
    assert (warning is not None) == (vague_share > 0), heard
    assert warning is None or "--caption_supervision off" in warning


@pytest.mark.slow
def test_a_run_says_so_once_where_it_would_learn_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(tmp_path, 0.5)
    for choice, expected in (("on", 1), ("off", 0)):
        flags = ["--config", "tiny_demo", "--refcoco_dir", str(tmp_path / "ref_seg"), "--device", "cpu"]
        flags += ["--max_steps", "2", "--output_dir", str(tmp_path / choice), "--caption_supervision", choice]
        assert main([*flags, "--cfg-options", "data.refcoco_datasets=refcoco", "data.refcoco_weight=none"]) == 0
        assert capsys.readouterr().out.count("references are vaguer") == expected


def region(text: str, reference_iou: float, caption: str, caption_iou: float) -> MeasuredRegion:
    sentences = [SegmentedSentence(text, 1, reference_iou * 100, 100), SegmentedSentence("x " * 9, 1, 0, 100)]
    one = MeasuredRegion("a#0", "a", references=[text, "x " * 9], sentences=sentences, caption=caption)
    one.cycle = SegmentedCaption(caption_iou * 100, 100)
    return one


def test_a_reference_with_fewer_words_is_heard_beside_the_caption() -> None:
    regions = [region("the star", 0.25, "the red star", 0.75), region("the red star", 0.5, "the star", 0.125)]
    assert heard_regions([*regions, MeasuredRegion("b#0", "b", cycle=SegmentedCaption(1, 1))]) == [
        HeardRegion("a", 0.25, 0.75),
        HeardRegion("a", None, 0.125),
    ]


@pytest.mark.parametrize(
    ("num_vague", "loss", "warned"),
    [(100, 0.2, True), (20, 0.2, False), (100, 0.0, False), (100, -0.2, False)],
    ids=["many and worse", "few", "many and as good", "many and better"],
)
def test_a_warning_needs_many_vague_references_with_worse_masks(num_vague: int, loss: float, warned: bool) -> None:
    rng = np.random.default_rng(0)
    ious = rng.uniform(0.3, 0.7, 200).tolist()
    heard = [
        HeardRegion(str(n), iou - loss + rng.normal() * 0.1 if n < num_vague else None, iou)
        for n, iou in enumerate(ious)
    ]
    warning = warn_of_vague_references(heard)
    assert (warning is not None) == warned
    assert not warned or f"{num_vague} of 200" in str(warning)
    assert warn_of_vague_references(heard[: REGIONS // 2 - 1]) is None, "too few to say anything"


class Source:
    """``count`` images of one region; every second one has a caption where ``is_captioned``."""

    name = "masks"

    def __init__(self, count: int, is_captioned: bool = True) -> None:
        self.count, self.is_captioned, self.loaded = count, is_captioned, list[int]()

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        self.loaded.append(index)
        texts = (("a star",),) if self.is_captioned and index % 2 else ((),)
        return RegionSample("masks", str(index), np.zeros((4, 4, 3), np.uint8), np.ones((1, 4, 4), bool), ("0",), texts)


def test_ranks_share_out_the_regions_and_uncaptioned_sources_are_left_alone() -> None:
    parts = [list(captioned_samples([Source(2000)], 1, rank, 2)) for rank in range(2)]
    names = [{sample.sample_id for sample in part} for part in parts]
    assert not names[0] & names[1]
    assert [sum(map(bool, (s.captions[0] for s in part))) for part in parts] == [REGIONS // 2] * 2
    small, bare = Source(REGIONS - 1), Source(2000, is_captioned=False)
    assert len(list(captioned_samples([small, bare], 1))) == 8
    assert (len(small.loaded), len(bare.loaded)) == (0, 8)
