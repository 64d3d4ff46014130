"""The lowest layer: a cheap import, one message shape, errors and samples that cross processes."""

from __future__ import annotations

import copy
import errno
import pickle
import subprocess
import sys

import numpy as np
import pytest

import dual_loop
from dual_loop import errors
from dual_loop.errors import DualLoopError, EnvironmentProblem, SampleError, explain, listed, shorten, writing
from dual_loop.types import Batch, LossTerm, RegionCaption, RegionSample, WrittenCaption

HEAVY = ("torch", "transformers", "mmengine", "matplotlib")


@pytest.mark.parametrize("modules", ["dual_loop", "dual_loop.types, dual_loop.errors, dual_loop.config"])
def test_import_is_cheap(modules: str) -> None:
    code = f"import {modules}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_lazy_name_is_the_object_of_its_module() -> None:
    from dual_loop.config import load_config

    assert dual_loop.load_config is load_config


@pytest.mark.parametrize("name", [name for name in dual_loop.__all__ if name != "__version__"])
def test_every_public_name_resolves(name: str) -> None:
    assert callable(getattr(dual_loop, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dual_loop.nonsense


def test_explain_says_everything_in_order() -> None:
    message = explain("mask is empty.", "sa_1.json, object 3", 0, "at least 1 pixel", "drop the object")
    assert message == (
        "mask is empty; where: sa_1.json, object 3; seen: 0; expected: at least 1 pixel; to do: drop the object"
    )


def test_explain_writes_an_exception_with_its_type() -> None:
    assert explain("nothing read", seen=KeyError("image")) == "nothing read; seen: KeyError: 'image'"


def test_explain_leaves_out_what_is_not_given_and_keeps_falsy_values() -> None:
    assert explain("nothing read") == "nothing read"
    assert explain("nothing read", seen=0, expected=[]) == "nothing read; seen: 0; expected: []"


def test_a_sample_error_survives_pickle_and_copy() -> None:
    error = SampleError("truncated_file", explain("file ends early", "a.npz", 10, 20))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is SampleError
        assert again.reason == "truncated_file"
        assert str(again) == str(error) == "file ends early; where: a.npz; seen: 10; expected: 20"


def test_every_error_is_a_dual_loop_error() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 6
    assert all(issubclass(cls, DualLoopError) for cls in classes)


def test_a_single_image_is_its_own_target() -> None:
    image, masks = np.zeros((4, 6, 3), np.uint8), np.ones((2, 4, 6), bool)
    sample = RegionSample("sa1b", "sa_1", image, masks, region_ids=("0", "1"), captions=((), ()))
    assert sample.segmentation_image is image
    assert sample.segmentation_masks is masks


def test_a_frame_pair_is_segmented_on_its_second_frame() -> None:
    first, second = np.zeros((4, 6, 3), np.uint8), np.ones((4, 6, 3), np.uint8)
    masks, target = np.ones((1, 4, 6), bool), np.zeros((1, 4, 6), bool)
    sample = RegionSample(
        "sav", "v", first, masks, region_ids=("0",), captions=((),), target_image=second, target_masks=target
    )
    assert sample.segmentation_image is second
    assert sample.segmentation_masks is target


def test_a_loss_term_divides_by_its_count_and_never_by_zero() -> None:
    import torch

    assert LossTerm(torch.tensor(6.0), 4).mean.item() == 1.5
    assert LossTerm(torch.tensor(0.0), 0).mean.item() == 0.0


def test_captions_say_what_was_rejected_and_list_what_was_written() -> None:
    greedy, first, second = (WrittenCaption(text, (1,), None, False) for text in "abc")
    captions = [RegionCaption("a"), RegionCaption("b", rejected="special_token"), RegionCaption("c", rejected="empty")]
    assert sum(caption.rejected is not None for caption in captions) == 2
    assert all(caption.is_kept and not caption.is_reference for caption in captions)
    assert captions[0].written == ()
    assert RegionCaption("a", greedy=greedy, samples=(first, second)).written == (greedy, first, second)
    assert RegionCaption("a", samples=(first, second)).written == (first, second)


def test_a_batch_moves_pixels_and_target_masks_and_nothing_else() -> None:
    import torch

    batch = Batch(
        pixel_values=torch.zeros(1, 3, 8, 8), tiles_per_view=[1], caption_view=[0], target_view=[0],
        g_pixel_values=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), prompt_masks=torch.ones(2, 2, 2, dtype=torch.bool),
        grid_rescued=torch.zeros(2, dtype=torch.bool), target_masks=torch.zeros(2, 2, 2, dtype=torch.uint8),
        region_image=torch.zeros(2, dtype=torch.int64), region_seeds=torch.arange(2), captions=["a", None],
        region_names=["sav/v#0", "sav/v#1"], sources=["sav"],
    )  # fmt: skip
    moved = batch.to("meta")
    places = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {name for name, place in places.items() if place == "meta"} == {
        *("pixel_values", "g_pixel_values", "target_masks")
    }
    assert len(places) == 7
    assert (moved.num_images, moved.num_regions, moved.captions) == (1, 2, ["a", None])
    assert moved.references == [("a",), ()]
    assert batch.pixel_values.device.type == "cpu"


def test_a_long_value_is_shortened() -> None:
    assert shorten([1, "a"]) == "[1, 'a']"
    assert len(shorten("x" * 100)) == 60


def test_a_long_list_is_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_only_errors_of_a_disk_are_turned_where_a_net_is_asked_for() -> None:
    with pytest.raises(FileNotFoundError), writing("x", "y", net=True):
        raise FileNotFoundError(2, "gone")
    expected = r"x cannot be written; where: y;.*expected: 1,000 bytes.*quota"
    with pytest.raises(EnvironmentProblem, match=expected), writing("x", "y", 1000, net=True):
        raise OSError(errno.EDQUOT, "quota exceeded")
