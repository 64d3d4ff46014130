"""Packed rows of one batch: which branches share an image, and where every branch starts.

A row is an image prefix and the branches that ask about it (``model.packing``). The first B rows show the images that
are segmented, in the batch's order; captioning branches of a frame pair, which belong to the other frame, get rows of
their own behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dual_loop.model.packing import pack_rows
from dual_loop.model.prompts import Branch, Prompter
from dual_loop.types import Batch


@dataclass
class _Row:
    view: int
    branches: list[Branch] = field(default_factory=list)
    prompt_masks: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a branch stands: its row, and its number in the row."""

    row: int
    branch: int


class Rows:
    """Collects the branches of one batch and packs them.

    Args:
        batch: B images with N regions.
        prompter: gives the image prefixes.
        captions_only: make no rows for the images that are segmented (rows are then made as branches need them).
        is_packed: branches about one image share its row; else every branch gets a row of its own
            (``speed.pack_branches``).
    """

    def __init__(self, batch: Batch, prompter: Prompter, captions_only: bool = False, is_packed: bool = True) -> None:
        self.batch, self.prompter, self.is_packed = batch, prompter, is_packed
        self.rows = [] if captions_only or not is_packed else [_Row(view) for view in batch.target_view]
        self._row_of_view = {row.view: index for index, row in enumerate(self.rows)}
        self._images = batch.region_image.tolist()

    def add_segmentation(self, region: int, branch: Branch) -> Place:
        """Add a branch with [SEG] about the image that the region is segmented on; regions in ascending order."""
        if not self.is_packed:
            self.rows.append(_Row(self.batch.target_view[self._images[region]]))
            return self._add(len(self.rows) - 1, branch)
        return self._add(self._images[region], branch)

    def add_captioning(self, region: int, branch: Branch) -> Place:
        """Add a branch with the region's prompt about the image that the region is captioned on."""
        view = self.batch.caption_view[self._images[region]]
        if not self.is_packed or view not in self._row_of_view:
            self._row_of_view[view] = len(self.rows)
            self.rows.append(_Row(view))
        index = self._row_of_view[view]
        self.rows[index].prompt_masks.append(self.batch.prompt_masks[region])
        return self._add(index, branch)

    def _add(self, row: int, branch: Branch) -> Place:
        self.rows[row].branches.append(branch)
        return Place(row, len(self.rows[row].branches) - 1)

    def start_of(self, place: Place) -> int:
        """Return the column where the branch at ``place`` starts."""
        row = self.rows[place.row]
        prefix = len(self.prompter.image_prefix(self.batch.tiles_per_view[row.view]))
        return prefix + sum(len(branch.input_ids) for branch in row.branches[: place.branch])

    def row_images(self) -> list[int]:
        """Return for each row which of the B images is segmented there; 0 for a row without [SEG]."""
        image_of_view = {view: image for image, view in enumerate(self.batch.target_view)}
        return [image_of_view.get(row.view, 0) for row in self.rows]

    def pack(self, vision_features: Tensor | None) -> dict[str, Any]:
        """Return the model's inputs: packed ids, masks and labels, what it sees by row, and the region prompts.

        Args:
            vision_features: (T, M, D_vision) of all views of the batch; None gives the model the tiles themselves,
                row by row, so that the vision tower runs again.
        """
        device, offsets = self.batch.pixel_values.device, self.batch.tile_offsets
        counts = [self.batch.tiles_per_view[row.view] for row in self.rows]
        prefixes = [self.prompter.image_prefix(count) for count in counts]
        branches = [row.branches for row in self.rows]
        packed = pack_rows(prefixes, branches, self.prompter.tokenizer.pad_token_id or 0)
        tiles = [offsets[row.view] + k for row, count in zip(self.rows, counts, strict=True) for k in range(count)]
        last_tile = torch.tensor(counts).cumsum(0) - 1
        prompt_tile = [int(last_tile[index]) for index, row in enumerate(self.rows) for _ in row.prompt_masks]
        masks = [mask for row in self.rows for mask in row.prompt_masks]
        empty = self.batch.prompt_masks[:0]
        return {
            **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in packed.items()},
            **(
                {"pixel_values": self.batch.pixel_values[tiles]}
                if vision_features is None
                else {"vision_features": vision_features[tiles]}
            ),
            "region_tile": torch.tensor(prompt_tile, dtype=torch.long, device=device),
            "prompt_masks": (torch.stack(masks) if masks else empty).to(device),
        }
