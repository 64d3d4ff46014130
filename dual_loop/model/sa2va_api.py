"""``VideoLLaVASAMModel``: Sa2VA behind the names and the data dict of the original's code.

A thin adapter: it brings what the original's collate function hands over into tensors, and asks ``Sa2VA``. The loop of
this package does not pass through it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_loop.config import LossConfig
from dual_loop.errors import PromptError, explain
from dual_loop.losses import dice_loss, mask_cross_entropy
from dual_loop.model.object_count import object_order
from dual_loop.model.sa2va import Sa2VA
from dual_loop.points import point_sample, sample_points
from dual_loop.types import Segmentation

ORIGINAL_AVERAGE_OFFSET = 1e-4
"""What the original adds to its divisors; it matters only for parity with published values."""

Data = Mapping[str, Any]
"""What the original's collate function hands over: tensors, lists of tensors, numbers."""


class VideoLLaVASAMModel(Sa2VA):
    """Sa2VA with the original's ``forward(data, mode)`` and ``generate``.

    Attributes:
        loss_config: weights, point sampling and object count of ``mode="loss"``.
    """

    loss_config = LossConfig()

    def forward(self, data: Data, mode: str = "loss") -> dict[str, Tensor | Segmentation]:
        """Segment every [SEG] of a batch and compute the losses, as the original does.

        Args:
            data: ``input_ids`` (B, L); ``attention_mask`` (B, L) and ``position_ids`` (B, L), both optional;
                ``labels`` (B, L), -100 where no loss.
                ``pixel_values``: (T, 3, I, I), (B, tiles, 3, I, I), or a list of (tiles, 3, I, I) or (3, I, I); an
                all-zero tile (of a sample without an image) is left out of the tower; absent where no sample has one.
                ``g_pixel_values``: (F, 3, S, S) or a list of (3, S, S), 0..255, the frames of all samples with [SEG].
                ``frames_per_batch``: for each such sample its number of frames (1 each where absent).
                ``masks``: for each such sample (n x frames, H, W), object by object and frame by frame inside an
                object, or one (N, Q, Q) tensor in that order.
                ``prompt_masks``: a list of (n, G, G) bool for the tiles where ``vp_overall_mask`` (T,) is 1.
                Optional: ``region_seeds`` (N,) int64 (points of the mask loss), ``point_coords`` (N, points, 2),
                ``object_order`` (B * K,).
            mode: ``"loss"``: ``loss_mask``, ``loss_dice``, ``llm_loss`` with the names, weights and averages of Sa2VA
                over this batch alone; with ``loss.num_objects`` K the objects become K a frame, in the order
                ``object_order`` or else by ``object_count.object_order``, and ``point_coords`` are theirs. Without
                ``masks`` and ``g_pixel_values`` the mask losses are zeros with a graph.
                ``"predict"``: ``segmentation`` alone.

        Raises:
            PromptError: something is missing, of a wrong kind, or does not fit together.
        """
        _need(mode in ("loss", "predict"), "unknown forward mode", "mode", mode, "loss or predict")
        ids = self._ids(data)
        has_masks = data.get("masks") is not None
        levels = None
        if data.get("g_pixel_values") is not None:
            # Before the language model, whose graph would be alive beside all that the encoder needs for a moment.
            levels = self.encode_grounding(self._frames(data["g_pixel_values"]))
        elif has_masks or mode == "predict":
            fix = "give g_pixel_values with masks, or neither for a batch of language alone"
            raise PromptError(explain("there is no image to segment", "g_pixel_values", "nothing", "images", fix))
        hidden = self.hidden_states(data)
        if mode == "predict":
            assert levels is not None
            row, column, frame = self._objects(data, ids, len(levels[0]))
            return {"segmentation": self.decode_masks(self.seg_embeds(hidden[row, column]), levels, frame)}
        labels = _beside(ids, data, "labels")
        carries = labels[:, 1:] != -100
        self._check_vocabulary(labels[:, 1:][carries], "labels")
        total = self.token_loss(hidden[:, :-1][carries], labels[:, 1:][carries])
        llm_loss = total * (self.loss_config.language_weight / max(int(carries.sum()), 1))
        if not has_masks:
            return {**self._zero_losses(hidden), "llm_loss": llm_loss}
        assert levels is not None
        return {**self._mask_losses(data, ids, hidden, levels), "llm_loss": llm_loss}

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_masks: Sequence[Tensor] | None = None,
        vp_overall_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts with transformers' ``generate``.

        Args:
            pixel_values: as in :meth:`forward`, also ``prompt_masks`` and ``vp_overall_mask``.
            input_ids: (R, L) int64, padded on the left where ``attention_mask`` (R, L) is 0.
            options: of ``generate``: ``max_new_tokens``, ``do_sample``, ``eos_token_id``, ...

        Returns:
            (R, new tokens) int64, new tokens only.

        Raises:
            PromptError: as in :meth:`forward`.
        """
        data = {"input_ids": input_ids, "pixel_values": pixel_values, "prompt_masks": prompt_masks}
        data |= {"attention_mask": attention_mask, "vp_overall_mask": vp_overall_mask}
        ids = self._ids(data)
        mask = torch.ones_like(ids) if attention_mask is None else _beside(ids, data, "attention_mask").long()
        self.sync_new_tokens()
        embeds = self.input_embeddings(data)
        output = self.mllm.generate(inputs_embeds=embeds, attention_mask=mask, **options)
        return torch.as_tensor(getattr(output, "sequences", output))

    def hidden_states(self, data: Data) -> Tensor:
        """Run the vision-language part of :meth:`forward`: last hidden states (B, L, D)."""
        ids = self._ids(data)
        mask = torch.ones_like(ids) if data.get("attention_mask") is None else _beside(ids, data, "attention_mask")
        positions = None if data.get("position_ids") is None else _beside(ids, data, "position_ids")
        return self.run_language(self.input_embeddings(data), mask, positions)

    def input_embeddings(self, data: Data) -> Tensor:
        """Return what enters the language model in :meth:`forward`: (B, L, D), image and region tokens in place."""
        ids = self._ids(data)
        tiles = self._tiles(data.get("pixel_values"))
        # A sample without an image comes with a tile of zeros, which no token stands for.
        holds_image = tiles.flatten(1).any(1)
        prompts = self._region_prompts(data, holds_image)
        if not bool(holds_image.any()):
            if bool((ids == self.image_context_id).any()):
                raise PromptError(explain("there is no image for the image tokens", "pixel_values", "none", "images"))
            return self._embed_ids(ids)
        features = self.project_vision(self.encode_vision(tiles[holds_image]))
        return self.embed_prompt(ids, features, *prompts)

    # ---- what the original's collate hands over ----------------------------------------------------------------------

    def _ids(self, data: Data) -> Tensor:
        _need(isinstance(data, Mapping), "the model takes a dict", "data", type(data).__name__, "a dict of tensors")
        ids = _tensor(data, "input_ids", self.device)
        is_table = ids.dim() == 2 and ids.numel() > 0
        _need(is_table, "token ids have a wrong form", "input_ids", tuple(ids.shape), "(B, L) int64")
        self._check_vocabulary(ids, "input_ids")
        return ids

    def _check_vocabulary(self, ids: Tensor, name: str) -> None:
        size = self.mllm.get_input_embeddings().num_embeddings
        _need(ids.dtype in (torch.int32, torch.int64), "token ids have a wrong form", name, ids.dtype, "int64")
        if bool(((ids < 0) | (ids >= size)).any()):
            seen = f"{int(ids.min())} to {int(ids.max())}"
            raise PromptError(explain("a token id is outside of the vocabulary", name, seen, f"0 to {size - 1}"))

    def _tiles(self, pixel_values: Tensor | Sequence[Tensor] | None) -> Tensor:
        """Return the tiles of all samples, (T, 3, I, I), in order; none at all where no image is given."""
        side = self.mllm.model.vision_tower.config.image_size
        parts = [torch.zeros(0, 3, *side)]
        if isinstance(pixel_values, Tensor):
            parts = [pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values]
        elif pixel_values is not None:
            parts += [part[None] if part.dim() == 3 else part for part in _tensors(pixel_values, "pixel_values")]
        seen, expected = [tuple(part.shape) for part in parts], f"(tiles, 3, {side[0]}, {side[1]}) each"
        fits = all(len(shape) == 4 and shape[1:] == (3, *side) for shape in seen)
        _need(fits, "image tiles have the wrong size", "pixel_values", seen, expected)
        return torch.cat([part.to(self.device) for part in parts])

    def _frames(self, g_pixel_values: Tensor | Sequence[Tensor]) -> Tensor:
        side = self.grounding_encoder.prompt_encoder.input_image_size
        parts = _tensors(g_pixel_values, "g_pixel_values")
        shapes, expected = [tuple(part.shape) for part in parts], f"(3, {side}, {side}) each, pixels of 0..255"
        fits = shapes and all(shape == (3, side, side) for shape in shapes)
        _need(fits, "grounding images have the wrong size", "g_pixel_values", shapes, expected)
        return torch.stack(parts).to(self.device)

    def _region_prompts(self, data: Data, holds_image: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``region_tile`` (P,), counted over the tiles that hold an image, and ``prompt_masks`` (P, G, G)."""
        given = data.get("prompt_masks")
        side = int(self.mllm.config.image_seq_length**0.5)
        masks = [] if given is None else [mask.to(self.device).bool() for mask in _tensors(given, "prompt_masks")]
        masks = [mask[None] if mask.dim() == 2 else mask for mask in masks]
        fits = all(mask.dim() == 3 and mask.shape[1:] == (side, side) for mask in masks)
        shapes, expected = [tuple(mask.shape) for mask in masks], f"(regions, {side}, {side}) each"
        _need(fits, "region prompts have the wrong size", "prompt_masks", shapes, expected)
        if not masks:
            none = torch.zeros(0, dtype=torch.long, device=self.device)
            return none, torch.zeros(0, side, side, dtype=torch.bool, device=self.device)
        overall = _tensor(data, "vp_overall_mask", self.device).flatten() > 0
        seen, expected = f"{len(overall)} entries", f"{len(holds_image)}, one for each tile"
        fits = len(overall) == len(holds_image)
        _need(fits, "vp_overall_mask does not fit the tiles", "vp_overall_mask", seen, expected)
        tiles = overall[holds_image].nonzero().flatten()
        where, seen = "vp_overall_mask and prompt_masks", f"{len(tiles)} tiles and {len(masks)} groups of regions"
        _need(len(tiles) == len(masks), "vp_overall_mask and prompt_masks differ", where, seen, "as many")
        counts = torch.tensor([len(mask) for mask in masks], device=tiles.device)
        return tiles.repeat_interleave(counts), torch.cat(masks)

    def _objects(self, data: Data, ids: Tensor, num_frames: int) -> Tensor:
        """Return row and column of the [SEG], and the frame, of the N objects: (3, N) int64.

        There is one for each [SEG] and frame: samples in order, then [SEG] by [SEG], then frame by frame.
        """
        seg = ids == self.seg_id
        samples = [row for row, count in enumerate(seg.sum(1).tolist()) if count]
        listed = data.get("frames_per_batch")
        frames = [1] * (num_frames if listed is None else 0)
        if listed is not None:
            frames = listed.tolist() if isinstance(listed, Tensor) else listed
            are_numbers = isinstance(frames, (list, tuple)) and all(isinstance(count, Integral) for count in frames)
            _need(are_numbers, "frames are no numbers", "frames_per_batch", listed, "a list of integers")
        if len(frames) == len(ids) != len(samples):
            samples = list(range(len(ids)))  # a sample without [SEG] may bring an image all the same
        seen = f"frames_per_batch {frames} over {num_frames} images and {len(samples)} samples with [SEG]"
        expected = "one number for each sample with [SEG], which add up to the images"
        fits = len(frames) == len(samples) and sum(frames) == num_frames and min(frames, default=1) >= 1
        _need(fits, "frames and images do not fit", "frames_per_batch", seen, expected)
        places, first = [], 0
        for row, count in zip(samples, frames, strict=True):
            columns = seg[row].nonzero().flatten().tolist()
            places += [(row, column, frame) for column in columns for frame in range(first, first + count)]
            first += count
        return torch.tensor(places, dtype=torch.long, device=self.device).reshape(-1, 3).T

    def _targets(self, masks: Tensor | Sequence[Tensor]) -> Tensor:
        """Bring target masks to (N, Q, Q) by nearest neighbour, without padding."""
        parts = [masks] if isinstance(masks, Tensor) else _tensors(masks, "masks")
        seen = [tuple(part.shape) for part in parts]
        fits = all(len(shape) == 3 for shape in seen)
        _need(fits, "target masks have a wrong form", "masks", seen, "(objects, H, W) each")
        side = self.mask_size
        resized = [F.interpolate(part[None].float(), (side, side), mode="nearest")[0] for part in parts]
        return torch.cat(resized).to(self.device) if parts else torch.zeros(0, side, side, device=self.device)

    def _mask_losses(self, data: Data, ids: Tensor, hidden: Tensor, levels: list[Tensor]) -> dict[str, Tensor]:
        is_plain, fix = data.get("region_weights") is None, "use loop.task.DualLoopTask"
        _need(is_plain, "the original weighs no regions", "region_weights", "a value", "nothing", fix)
        row, column, frame = self._objects(data, ids, len(levels[0]))
        config, targets, count = self.loss_config, self._targets(data["masks"]), len(row)
        seen = f"{int((ids == self.seg_id).sum())} [SEG] tokens, {len(levels[0])} frames and {len(targets)} masks"
        fix = "give each [SEG] one mask for each frame of its sample"
        _need(len(targets) == count, "every [SEG] needs one mask a frame", "masks", seen, str(count), fix)
        if not count:
            return self._zero_losses(hidden)
        seeds = torch.arange(count)
        if data.get("region_seeds") is not None:
            seeds = _tensor(data, "region_seeds", self.device)
            fits = tuple(seeds.shape) == (count,) and seeds.dtype == torch.int64
            seen, expected = f"{tuple(seeds.shape)} {seeds.dtype}", f"({count},) int64"
            _need(fits, "one seed an object is needed", "region_seeds", seen, expected)
        order = torch.arange(count, device=self.device)
        if config.num_objects is not None:
            order = object_order(frame, len(levels[0]), config.num_objects, seeds)
        if data.get("object_order") is not None:
            order = _tensor(data, "object_order", self.device)
            is_list = order.dim() == 1 and order.dtype == torch.int64 and len(order)
            fits = bool(is_list) and int(order.min()) >= 0 and int(order.max()) < count
            expected = f"numbers of objects, 0 to {count - 1}, int64"
            _need(fits, "no such object", "object_order", order.tolist(), expected)
        logits = self.decode_masks(self.seg_embeds(hidden[row, column])[order], levels, frame[order]).mask_logits
        points = None
        if data.get("point_coords") is not None:
            points = _tensor(data, "point_coords", self.device)
            fits = points.dim() == 3 and (len(points), points.shape[2]) == (len(order), 2)
            _need(fits, "points do not fit", "point_coords", tuple(points.shape), f"({len(order)}, points, 2)")
        elif config.num_points > 0:
            ratios = config.oversample_ratio, config.importance_sample_ratio
            # The k-th repetition of an object adds k to its seed, for points of its own.
            repeats: Counter[int] = Counter()
            own = seeds[order.to(seeds.device)].tolist()
            for place, seed in enumerate(own):
                own[place] = (seed + repeats[seed]) % 2**63
                repeats[seed] += 1
            points = sample_points(logits, torch.tensor(own, dtype=torch.long), config.num_points, *ratios)
        return original_mask_losses(logits, targets[order], config, points)

    def _zero_losses(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return mask losses of 0 whose graph reaches all that segments, so that every rank has the same gradients."""
        side = self.grounding_encoder.prompt_encoder.input_image_size
        levels = self.encode_grounding(torch.zeros(1, 3, side, side, device=self.device))
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        zero = self.decode_masks(self.seg_embeds(hidden[:1, 0]), levels, first).mask_logits.sum() * 0.0
        return {"loss_mask": zero, "loss_dice": zero.clone()}


def _need(holds: object, what: str, where: str, seen: object, expected: object, fix: str = "") -> None:
    """Refuse an input of the model unless ``holds``."""
    if not holds:
        raise PromptError(explain(what, where, seen, expected, fix))


def _tensor(data: Data, name: str, device: torch.device) -> Tensor:
    value = data.get(name)
    if not isinstance(value, Tensor):
        seen = "nothing" if value is None else type(value).__name__
        raise PromptError(explain("an input of the model is missing or no tensor", name, seen, "a tensor"))
    return value.to(device)


def _beside(ids: Tensor, data: Data, name: str) -> Tensor:
    value = _tensor(data, name, ids.device)
    expected = f"{tuple(ids.shape)}, as input_ids"
    _need(value.shape == ids.shape, f"{name} does not fit input_ids", name, tuple(value.shape), expected)
    return value


def _tensors(values: object, name: str) -> list[Tensor]:
    if isinstance(values, Tensor) and values.dim():
        return list(values)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, Tensor) for value in values):
        raise PromptError(explain("an input of the model has a wrong kind", name, type(values).__name__, "tensors"))
    return list(values)


def original_mask_losses(
    mask_logits: torch.Tensor, target_masks: torch.Tensor, config: LossConfig, point_coords: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return ``loss_mask`` and ``loss_dice`` as the original Sa2VA code averages them over one batch.

    For comparison with published values only. Over all pixels the averages are plain means. Over points the original
    divides dice by ``N + 1e-4`` and cross-entropy by ``N * P + 1e-4``, and adds the float32 machine epsilon to both.

    Args:
        mask_logits: (N, Q, Q) float, N >= 1. target_masks: (N, Q, Q) in 0..1.
        point_coords: (N, P, 2) points (x, y) in 0..1, None for all pixels.
    """
    logits, targets, num_points, extra = mask_logits, target_masks, 1, 0.0
    if point_coords is not None:
        logits, targets = point_sample(logits, point_coords), point_sample(targets, point_coords)
        num_points, extra = logits.shape[1], ORIGINAL_AVERAGE_OFFSET + torch.finfo(torch.float32).eps
    entropy, dice, count = mask_cross_entropy(logits, targets).sum(), dice_loss(logits, targets).sum(), len(logits)
    return {
        "loss_mask": entropy * num_points / (count * num_points + extra) * config.mask_weight,
        "loss_dice": dice / (count + extra) * config.dice_weight,
    }
