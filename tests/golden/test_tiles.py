"""Images of several tiles on the original's recorded weights, in both directions, against the original's way.

The recorded sets have one tile an image. Here the text is one row with every token in its place, filled by loops as the
original fills it (tile by tile, each with the regions that refer to it, which are those of the last one), and decoded
without a cache; the package shares prefixes, packs turns and keeps keys and values.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "scripts")]

from dual_loop.config import LoopConfig  # noqa: E402
from dual_loop.data.images import read_picture  # noqa: E402
from dual_loop.data.prepare import batch_from_samples, collate  # noqa: E402
from dual_loop.loop.captioner import Captioner  # noqa: E402
from dual_loop.loop.scorer import Scorer  # noqa: E402
from dual_loop.types import RegionSample  # noqa: E402

from parity.case import Case, load_case  # noqa: E402
from parity.report import Report  # noqa: E402
from parity.weights import import_full  # noqa: E402

NEW_TOKENS, TEXT = 3, "the red circle"
SETTINGS = LoopConfig(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return load_case(golden / "sa2va_tiny")


@pytest.fixture(scope="module")
def model(case: Case) -> Any:
    return import_full(case, Report()).eval()


@pytest.fixture(scope="module")
def batch(case: Case) -> Any:
    """Both recorded images, of seven and three tiles, with the recorded regions."""
    samples = []
    for name, masks in sorted(case.numbered("caption_region_masks").items()):
        image = read_picture(case.folder / case.notes["image_files"][name], apply_exif=False).pixels
        names = tuple(map(str, range(len(masks))))
        samples.append(RegionSample("recorded", str(name), image, masks.bool().numpy(), names, ((),) * len(masks)))
    sizes = [dataclasses.replace(case.geometry, max_tiles=most) for most in (6, 2)]
    joined = collate([batch_from_samples([sample], size) for sample, size in zip(samples, sizes, strict=True)])
    assert joined.tiles_per_view == [7, 3]
    return joined


def embedded(case: Case, model: Any, batch: Any, ids: list[int], image: int, region: int | None = None) -> Tensor:
    """(1, L, D): the original's filling of one row, which shows image ``image`` and at most one region of it."""
    features = model.project_vision(model.encode_vision(batch.pixel_values)).split(batch.tiles_per_view)[image]
    fill = []
    for number, tile in enumerate(features):
        fill += list(tile)
        if region is not None and number == len(features) - 1:
            fill += [token for token, cell in zip(tile, batch.prompt_masks[region].flatten(), strict=True) if cell]
    rows = model.mllm.get_input_embeddings()(torch.tensor(ids)).clone()
    places = [n for n, token in enumerate(ids) if token == model.image_context_id]
    assert len(places) == len(fill)
    for place, value in zip(places, fill, strict=True):
        rows[place] = value
    return rows[None]


@pytest.mark.slow
@torch.no_grad()
def test_a_mask_is_captioned_as_by_the_original(case, model, batch):
    [captions] = Captioner(model, case.prompter, SETTINGS).write([model.see(batch)], [batch])
    cells = batch.prompt_masks.flatten(1).sum(1).tolist()
    written = set()
    for region, caption in enumerate(captions):
        image = int(batch.region_image[region])
        ids = case.prompter.image_prefix(batch.tiles_per_view[image])
        ids += case.prompter.caption_question(cells[region], "short")
        rows = embedded(case, model, batch, ids, image, region)
        own: list[int] = []
        for _ in range(NEW_TOKENS):
            hidden = model.run_language(rows, torch.ones(rows.shape[:2], dtype=torch.long), None)
            own.append(int(model.answer_logits(hidden[:, -1]).argmax()))
            rows = torch.cat([rows, model.mllm.get_input_embeddings()(torch.tensor([own[-1:]]))], dim=1)
        assert list(caption.token_ids) == own[: len(caption.token_ids)]
        written.add(caption.token_ids)
    assert len(written) > 1, "captions that are all alike show nothing"


@torch.no_grad()
def test_a_caption_is_segmented_as_by_the_original(case, model, batch):
    seen = model.see(batch)
    firsts = [batch.region_image.tolist().index(image) for image in range(2)]
    found = Scorer(model, case.prompter, SETTINGS).segment(batch, seen, [(region, TEXT) for region in firsts])
    for image, masks in enumerate(found):
        ids = case.prompter.image_prefix(batch.tiles_per_view[image])
        ids += case.prompter.segment_turn(TEXT, "segment", "sure").input_ids
        rows = embedded(case, model, batch, ids, image)
        hidden = model.run_language(rows, torch.ones(rows.shape[:2], dtype=torch.long), None)[0]
        at_seg = hidden[torch.tensor(ids) == model.seg_id]
        levels = model.encode_grounding(batch.g_pixel_values[image : image + 1])
        expected = model.decode_masks(model.seg_embeds(at_seg), levels, torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(masks, expected.mask_logits, atol=2e-4, rtol=0)
