"""What happens before the model: images, region grids, targets, prompts, token ids."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import torch
from torch import Tensor

from dual_loop.data.images import read_picture
from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.data.prepare import Geometry, choose_tile_grid, grounding_image, image_to_tiles
from dual_loop.model.decode import left_pad
from dual_loop.model.prompts import (
    CAPTION_QUESTIONS,
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    Prompter,
    list_regions,
)
from dual_loop.types import Turn

from .case import Case
from .report import Report

REPEATED = re.compile(r"\{(\d+) x ([^{}]+)\}")
LISTING = re.compile(r"There are \d+ part regions in the picture: (.*?)\.\n")


def check_data(case: Case, report: Report) -> None:
    """Compare everything that the reference inputs let us make again."""
    report.section("pre-processing")
    check_tokenizer(case, report)
    check_images(case, report)
    for prefix in ("", "caption_"):
        check_regions(case, report, prefix)
    check_loss_prompts(case, report)
    check_caption_prompts(case, report)


def check_tokenizer(case: Case, report: Report) -> None:
    """Compare length and special ids with ``config.json``."""
    if "tokenizer_length" in case.original:
        report.same("tokenizer_length", len(case.tokenizer), case.original["tokenizer_length"])
    listed = dict(case.original.get("special_token_ids", {}))
    report.same("special_token_ids", {name: case.tokenizer.convert_tokens_to_ids(name) for name in listed}, listed)


def check_images(case: Case, report: Report) -> None:
    """Make both inputs from the image files."""
    files = case.notes.get("image_files", [])
    images = [read_picture(case.folder / name, apply_exif=False).pixels for name in files]
    tiles = case.tiles.split(case.tiles_per_sample())
    for index, image in enumerate(images):
        sizes = dataclasses.replace(case.geometry, max_tiles=tile_limit(case, image, len(tiles[index])))
        report.same(f"pixel_values, {files[index]}", image_to_tiles(image, sizes), tiles[index])
    for index, image in enumerate(images):
        made = grounding_image(image, case.geometry.grounding_size)
        report.same(f"g_pixel_values, {files[index]}", made, case.inputs["g_pixel_values"][index])


def tile_limit(case: Case, image: np.ndarray, num_tiles: int) -> int:
    """Return ``max_tiles`` that cuts ``image`` into ``num_tiles`` (thumbnail included): the original's if it does."""
    most = int(case.original.get("mllm", case.original).get("max_dynamic_patch", 12))

    def count(limit: int) -> int:
        height, width = image.shape[:2]
        columns, rows = choose_tile_grid(height, width, limit, case.geometry.vision_image_size)
        return columns * rows + (columns * rows > 1)

    return next((limit for limit in range(most, 0, -1) if count(limit) == num_tiles), 1)


def check_regions(case: Case, report: Report, prefix: str) -> None:
    """Pool the region masks to the token grid, and find the tiles that carry them."""
    grids = case.numbered(f"{prefix}prompt_masks")
    for sample, masks in case.numbered(f"{prefix}region_masks").items():
        seen = nearest_grid(masks, case.geometry)
        report.same(f"{prefix}prompt_masks.{sample}", seen, grids[sample].bool())
    counts = case.notes.get("caption_region_token_counts" if prefix else "region_token_counts")
    if counts:
        listed = dict(enumerate(counts)) if isinstance(counts, list) else {int(k): v for k, v in counts.items()}
        listed = {sample: list(values) for sample, values in listed.items() if values}
        seen_counts = {sample: grid.flatten(1).bool().sum(1).tolist() for sample, grid in grids.items()}
        report.same(f"{prefix}region_token_counts", seen_counts, listed)
    marked = case.inputs.get(f"{prefix}vp_overall_mask")
    if marked is not None:
        tiles = case.tiles_per_sample()
        # A region refers to the last tile of its sample: the thumbnail, or the only one.
        made = [float(sample in grids and k == n - 1) for sample, n in enumerate(tiles) for k in range(n)]
        report.same(f"{prefix}vp_overall_mask", torch.tensor(made), marked.float())


def nearest_grid(masks: Tensor, sizes: Geometry) -> Tensor:
    """Pool as the original does: this package would keep one cell of a region that has none, the original does not."""
    grid, rescued = pool_mask_to_grid(masks, sizes.grid_size, mode="nearest")
    return grid & ~rescued[:, None, None]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def check_loss_prompts(case: Case, report: Report) -> None:
    """Write the conversations of ``inputs.json`` again with our prompter: ids, labels and padding."""
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    texts = case.notes.get("loss_texts", [])
    for sample, short in enumerate(texts):
        text = expand(short)
        tiles = case.tiles_per_sample()[sample]
        written = (conversation(case.prompter, text, tiles, stock) for stock in (False, True))
        turn = next((found for found in written if found is not None), None)
        if turn is None:
            used = case.inputs["attention_mask"][sample].bool()
            expected = case.inputs["input_ids"][sample][used].tolist()
            report.same(f"loss_texts.{sample}, encoded as one text", case.prompter.encode(text), expected)
            continue
        rows.append(list(turn.input_ids))
        labels.append(list(turn.labels))
    if rows and len(rows) == len(texts):
        pad = int(case.notes.get("loss_pad_token_id", 0))
        report.same("input_ids, by the prompter", padded(rows, pad), case.inputs["input_ids"])
        report.same("labels, by the prompter", padded(labels, -100), case.inputs["labels"])
        mask = padded([[1] * len(row) for row in rows], 0).bool()
        report.same("attention_mask, by the prompter", mask, case.inputs["attention_mask"].bool())


def conversation(prompter: Prompter, text: str, num_tiles: int, stock: bool) -> Turn | None:
    """Take a conversation apart and let the prompter write it; None where it has another form than ours."""
    template = prompter.template
    before, after = (template.caption_turn if stock else template.segment_turn).split("{question}")
    end, separator = template.answer_end, "" if stock else template.segment_separator
    between = f"{template.turn_separator}{before}" if stock else before
    head = f"{before}{IMAGE_START}{IMAGE_CONTEXT * (num_tiles * prompter.image_tokens_per_tile)}{IMAGE_END}\n"
    if not text.startswith(head):
        return None
    rest, cells = text[len(head) :], list[int]()
    listing = LISTING.match(rest)
    if listing:
        cells, rest = count_cells(listing.group(1)), rest[listing.end() :]
        if list_regions(cells) + "\n" != listing.group(0):
            return None
    turns: list[tuple[str, str]] = []
    while rest:
        question, found, rest = rest.partition(after)
        answer, closed, rest = rest.partition(end)
        if not found or not closed:
            return None
        rest = rest.removeprefix(separator)
        turns.append((question.removeprefix(between) if turns else question, answer))
    return prompter.conversation(turns, num_tiles, cells, stock)


def check_caption_prompts(case: Case, report: Report) -> None:
    """Write the caption prompts of ``inputs.json`` again with our prompter, padded on the left."""
    rows = []
    tiles = case.tiles_per_sample()
    for sample, short in enumerate(case.notes.get("caption_texts", [])):
        rows.append(caption_ids(case.prompter, expand(short), tiles[sample]))
    if rows:
        ids, mask = left_pad(rows, case.tokenizer.pad_token_id)
        report.same("caption_input_ids, by the prompter", ids, case.inputs["caption_input_ids"])
        expected = case.inputs["caption_attention_mask"].bool()
        report.same("caption_attention_mask, by the prompter", mask, expected)


def caption_ids(prompter: Prompter, text: str, num_tiles: int) -> list[int]:
    """Return the ids of a caption prompt: as the loop asks where it has that form, else encoded after the image."""
    tail = text.partition(IMAGE_END)[2]
    listing = LISTING.match(tail.removeprefix("\n"))
    cells = count_cells(listing.group(1)) if listing else []
    after = prompter.template.caption_turn.partition("{question}")[2]
    if len(cells) == 1 and tail == f"\n{list_regions(cells)}\n\n{CAPTION_QUESTIONS['short']}{after}":
        return prompter.image_prefix(num_tiles) + prompter.caption_question(cells[0], "short")
    return prompter.image_prefix(num_tiles) + prompter.encode(tail)


def count_cells(listing: str) -> list[int]:
    """Return the number of placeholders of each listed region."""
    return [part.count(IMAGE_CONTEXT) for part in listing.split(", ")]


def expand(text: str) -> str:
    """Write out ``{256 x <IMG_CONTEXT>}``."""
    return REPEATED.sub(lambda match: match.group(2) * int(match.group(1)), text)


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """Pad on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def decoded(case: Case, ids: Tensor) -> list[str]:
    """Return the texts of generated ids (R, n), special tokens included."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [case.tokenizer.decode(row, **options) for row in ids.tolist()]
