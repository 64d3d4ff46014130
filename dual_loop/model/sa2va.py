"""``Sa2VA``: InternVL with LoRA and SAM 2, joined by the hidden state at [SEG]. It sees, reads and segments.

::

    see      images            -> features of both frozen encoders
    embed    packed rows       -> what enters the language model, image and region tokens in place
    read     embeddings        -> last hidden states
    segment  hidden at [SEG]   -> masks

It knows no loss weight, no reward and no teacher; those belong to ``loop``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, Sam2Model
from transformers.cache_utils import Cache

from dual_loop.errors import PromptError, explain
from dual_loop.losses import token_cross_entropy
from dual_loop.model.adapters import NewTokenRows
from dual_loop.model.hardware import send
from dual_loop.types import Batch, PackedBatch, Seen, Segmentation

MASKS_AT_ONCE = 16
"""Most masks decoded at a time without a graph: each takes some 50 MB of maps at SAM 2's 1024 pixels."""

TokenStep = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""New columns (R, 1, D), additive mask (R, 1, 1, columns), positions (R, 1), cache -> last hidden states (R, D)."""


class GroundingDecoder:
    """From [SEG] embeddings to masks with transformers' SAM 2, as Sa2VA does it on single frames.

    Three things differ from SAM 2's own point-prompt path: the sparse prompt is two "not a point" tokens followed by
    the language embedding, the image features carry the learned no-memory embedding (memory attention is not run), and
    masks are never replaced where the object score is not positive.

    Not a module itself: the model owns ``sam`` as ``grounding_encoder``, and a parameter must have one name.

    Args:
        sam: transformers' ``Sam2Model``.
        single_mask: take mask token 0 instead of the best of three by predicted IoU.
    """

    def __init__(self, sam: Any, single_mask: bool = False) -> None:
        self.sam = sam
        self.single_mask = single_mask

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Run trunk and neck: (B, 3, S, S) normalised float -> three levels, before the layers that train.

        They are (B, C0, 4Q', 4Q'), (B, C1, 2Q', 2Q'), (B, C, Q', Q') with Q' = S/16, fine to coarse, before ``conv_s0``
        and ``conv_s1``. C0 and C1 are :meth:`level_width`.
        """
        encoder = self.sam.vision_encoder
        with torch.set_grad_enabled(_trains(encoder) and torch.is_grad_enabled()):
            return list(encoder(pixels, return_dict=True).fpn_hidden_states)

    def finish(self, levels: list[Tensor]) -> list[Tensor]:
        """Apply ``conv_s0``, ``conv_s1`` (they belong to the trained decoder) and add the no-memory embedding."""
        decoder = self.sam.mask_decoder
        fine, middle, coarse = levels
        coarse = coarse + self.sam.no_memory_embedding.reshape(1, -1, 1, 1)
        return [decoder.conv_s0(fine), decoder.conv_s1(middle), coarse]

    def level_width(self, level: int) -> int:
        """Return the channels of a level, 0 the finest, as :meth:`encode` hands it out."""
        return int(self.sam.vision_encoder.neck.config.fpn_hidden_size)

    def sparse_prompts(self, seg_embeds: Tensor) -> Tensor:
        """(N, C) projected [SEG] embeddings -> (N, 1, 3, C) sparse prompts."""
        blank = self.sam.prompt_encoder.not_a_point_embed.weight.to(seg_embeds.dtype)
        return torch.cat([blank.expand(seg_embeds.shape[0], 2, -1), seg_embeds[:, None]], dim=1)[:, None]

    def decode_prompts(self, sparse: Tensor, levels: list[Tensor], image_index: Tensor) -> Segmentation:
        """Segment N objects, each on its image; without a graph, :data:`MASKS_AT_ONCE` at a time.

        Args:
            sparse: (N, 1, P, C) prompts: :meth:`sparse_prompts`, or SAM 2's own of points or boxes.
            levels: what :meth:`finish` returns, for B images.
            image_index: (N,) int64, the image of each object.

        Returns:
            The chosen masks as logits (N, Q, Q), with predicted IoUs, choices and object scores.
        """
        size = max(1, len(sparse)) if torch.is_grad_enabled() else MASKS_AT_ONCE
        found = []
        for part, index in zip(sparse.split(size), image_index.split(size), strict=True):
            masks, ious, scores, _ = self.decode_candidates(part, levels, index)
            chosen = ious.argmax(dim=-1)  # 0 where there is one candidate
            picked = masks[torch.arange(len(masks), device=masks.device), chosen]
            found.append((picked.float(), ious, chosen, scores))
        return Segmentation(*found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True)))

    def decode_candidates(
        self, sparse: Tensor, levels: list[Tensor], image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all candidates: logits (N, 3 or 1, Q, Q), predicted IoUs (N, 3 or 1), object scores (N, 1).

        The last are the tokens (N, 3 or 1, C) that the candidates are read from.
        """
        fine, middle, coarse = (level[image_index] for level in levels)
        dense = self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(coarse)
        positions = self.sam.get_image_wide_positional_embeddings().to(coarse.dtype).expand(len(sparse), -1, -1, -1)
        masks, ious, tokens, scores = self.sam.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=not self.single_mask,
            high_resolution_features=[fine, middle],
        )
        return masks[:, 0], ious[:, 0], scores[:, 0], tokens[:, 0]

    def point_prompts(self, points: Tensor) -> Tensor:
        """SAM 2's own prompt for one positive point an object: (N, 2) pixels in 0..S -> (N, 1, 2, C)."""
        labels = torch.ones(len(points), 1, 1, dtype=torch.long, device=points.device)
        sparse, _ = self.sam.prompt_encoder(points[:, None, None], labels, None, None)
        return torch.as_tensor(sparse)

    def box_prompts(self, boxes: Tensor) -> Tensor:
        """SAM 2's own prompt for one box an object: (N, 4) x1, y1, x2, y2 pixels in 0..S -> (N, 1, 2 or 3, C)."""
        sparse, _ = self.sam.prompt_encoder(None, None, boxes[:, None], None)
        return torch.as_tensor(sparse)


class Sa2VA(nn.Module):
    """Sa2VA on transformers' native classes: caption a region, segment from a caption.

    ``run_language``, ``step_language``, ``token_step``, ``repeated``, ``token_loss`` and
    ``grounding.encode``/``finish`` are the seams at which ``accelerate`` puts faster functions of the same results.

    Attributes:
        mllm: ``InternVLForConditionalGeneration`` with LoRA injected into its language model.
        grounding_encoder: ``Sam2Model``. grounding: runs it.
        text_hidden_fcs: Linear, ReLU, Linear from the language width D to the SAM 2 prompt width C.
        new_token_rows: trained rows of the new tokens, or None.
        group_rows: whether rows of unlike length may take several passes (not where layers are sharded).
        after_loading: what :meth:`finish` runs.

    Args:
        mllm, grounding_encoder, text_hidden_fcs: the parts.
        seg_id, image_context_id: token ids of ``[SEG]`` and ``<IMG_CONTEXT>``.
        image_mean, image_std: normalisation of the grounding image, three values for 0..1 pixels.
        single_mask: take mask candidate 0 instead of the best of three.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        mllm: InternVLForConditionalGeneration,
        grounding_encoder: Sam2Model,
        text_hidden_fcs: nn.Sequential,
        *,
        seg_id: int,
        image_context_id: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        single_mask: bool = False,
    ) -> None:
        super().__init__()
        self.mllm: Any = mllm
        self.grounding_encoder: Any = grounding_encoder
        self.text_hidden_fcs = text_hidden_fcs
        self.new_token_rows: NewTokenRows | None = None
        self.group_rows = True
        self.after_loading: list[Callable[[torch.device], str | None]] = []
        self.seg_id, self.image_context_id = seg_id, image_context_id
        self.grounding = GroundingDecoder(grounding_encoder, single_mask)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    def finish(self, device: torch.device) -> list[str]:
        """Do what waits for loaded weights and for ``device``, where they are; return lines to print.

        Frozen matrices may be no parameters any more after it.
        """
        return [line for run in self.after_loading if (line := run(device)) is not None]

    @property
    def device(self) -> torch.device:
        return self.image_mean.device

    @property
    def mask_size(self) -> int:
        """Q, the side of the mask logits."""
        return int(self.grounding_encoder.prompt_encoder.mask_input_size[0])

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower trains, so that its features of step 1 cannot serve step 2."""
        return _trains(self.mllm.model.vision_tower)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers of the language model."""
        return len(self.mllm.model.language_model.layers)

    # ---- see ---------------------------------------------------------------------------------------------------------

    def see(self, batch: Batch) -> Seen:
        """Run both image encoders on a batch: the vision tower on all tiles, SAM 2's encoder on the B images.

        Steps 1 to 3 and every measurement share the result. It holds no graph; an encoder that trains runs again where
        a graph is needed.
        """
        with torch.no_grad():
            vision = self.encode_vision(batch.pixel_values)
            trains = _trains(self.grounding_encoder.vision_encoder)
            levels = None if trains else self.encode_grounding(batch.g_pixel_values)
        return Seen(vision, levels)

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower: (T, 3, I, I) -> (T, M, D_vision), pixel-shuffled, before the projector.

        Raises:
            PromptError: the tiles have another size than the tower, which would interpolate without a word.
        """
        tower = self.mllm.model.vision_tower
        side = tower.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[-2:]) != tuple(side):
            seen, expected = tuple(pixel_values.shape), f"(T, 3, {side[0]}, {side[1]})"
            fix = "prepare images with the model's own geometry (model.build.geometry)"
            raise PromptError(explain("image tiles have the wrong size", "pixel_values", seen, expected, fix))
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            dtype = next(tower.parameters()).dtype
            hidden = tower(pixel_values=pixel_values.to(dtype), return_dict=True).last_hidden_state[:, 1:]
            grid_side = int(hidden.shape[1] ** 0.5)
            grid = hidden.reshape(len(hidden), grid_side, grid_side, -1)
            shuffled = self.mllm.model.pixel_shuffle(grid, scale_factor=self.mllm.config.downsample_ratio)
        return torch.as_tensor(shuffled.flatten(1, 2))

    def encode_grounding(self, g_pixel_values: Tensor) -> list[Tensor]:
        """Run SAM 2's image encoder on (B, 3, S, S) pixels of 0..255, normalised here; three levels, fine to coarse."""
        pixels = (g_pixel_values.float() / 255.0 - self.image_mean) / self.image_std
        return self.grounding.encode(pixels.to(self.image_mean.dtype))

    def project_vision(self, features: Tensor) -> Tensor:
        """Run the projector ``mlp1``: (T, M, D_vision) -> (T, M, D), row-major on the G x G token grid."""
        projector = self.mllm.model.multi_modal_projector
        return torch.as_tensor(projector(features.to(projector.linear_1.weight.dtype)))

    # ---- read --------------------------------------------------------------------------------------------------------

    def embed(self, packed: PackedBatch) -> Tensor:
        """Return what enters the language model: (R, L, D), image and region tokens in place."""
        vision = packed.vision
        if vision is None:
            tiles = torch.tensor([tile for row in packed.row_tiles for tile in row])
            vision = self.encode_vision(packed.batch.pixel_values[send(tiles, self.device)])
        features = self.project_vision(vision)
        return self.embed_prompt(packed.input_ids, features, packed.region_tile, packed.prompt_masks)

    def embed_prompt(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        region_tile: Tensor,
        prompt_masks: Tensor,
        has_images: bool = True,
    ) -> Tensor:
        """Embed token ids (B, L) and put image and region tokens in place (:func:`insert_image_tokens`).

        Ids, tiles and masks on the host cost no wait for the device.
        """
        embeds = self._embed_ids(send(input_ids, self.device))
        placeholder = (input_ids == self.image_context_id).cpu()
        return insert_image_tokens(embeds, placeholder, image_features, region_tile, prompt_masks, has_images)

    def _embed_ids(self, input_ids: Tensor) -> Tensor:
        embedded = self.mllm.get_input_embeddings()(input_ids)
        if self.new_token_rows is not None:
            embedded = self.new_token_rows.embed(input_ids, embedded)
        return torch.as_tensor(embedded)

    def read(self, embeds: Tensor, packed: PackedBatch) -> Tensor:
        """Run the language model over packed rows (R, L, D): last hidden states (R, L, D), from ``read_from`` on."""
        rows = (packed.attention_mask, packed.position_ids)
        return self.run_language(embeds, *rows, packed.read_from, packed.row_lengths)

    def run_language(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        read_from: int = 0,
        row_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the last hidden states (B, L, D), after the final norm.

        Args:
            embeds: (B, L, D).
            attention_mask: (B, L) with padding on the right, or (B, 1, L, L) bool for packed rows.
            position_ids: (B, L), or None for 0, 1, 2, ...
            read_from: columns of packed rows before it are read by nobody.
            row_lengths: columns of packed rows without padding; what is behind them is read by nobody.
        """
        if attention_mask.dim() == 4:
            attention_mask = additive_mask(attention_mask, embeds.dtype)
        output = self.mllm.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return torch.as_tensor(output.last_hidden_state)

    def step_language(self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Cache) -> Tensor:
        """Run new columns behind what ``cache`` holds; return the hidden state (R, D) of the last one.

        Args:
            embeds: (R, n, D), the new columns.
            mask: (R, 1, n, columns) additive, None where every column is seen.
            position_ids: (R, n) int64.
            cache: one layer for each of the model's; keys and values are appended.
        """
        output = self.mllm.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return torch.as_tensor(output.last_hidden_state[:, -1])

    def token_step(self) -> TokenStep:
        """Return :meth:`step_language` for single new columns of one generation, whose weights it may prepare."""
        return self.step_language

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what runs ``step``, which changes tensors in place and waits for nothing, again and again."""
        return step

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (P, V) of chosen hidden states (P, D)."""
        logits = self.mllm.lm_head(hidden)
        if self.new_token_rows is not None:
            logits = self.new_token_rows.logits(hidden, logits)
        return torch.as_tensor(logits)

    def token_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, summed, of tokens (P,) predicted by hidden states (P, D); logits exist a chunk at a time."""
        return token_cross_entropy(self.answer_logits, hidden, labels)

    def sync_new_tokens(self) -> None:
        """Write trained rows of new tokens into the embedding tables, which generation and export read."""
        if self.new_token_rows is not None:
            self.new_token_rows.write_back(self.mllm.get_input_embeddings(), self.mllm.lm_head)

    # ---- segment -----------------------------------------------------------------------------------------------------

    def segment(self, hidden: Tensor, packed: PackedBatch, positions: Tensor | None = None) -> Segmentation:
        """Segment the regions' [SEG] of packed rows, or those at ``positions`` (2, n), each on its image."""
        rows, columns = packed.seg_positions if positions is None else positions
        levels = self.encode_grounding(packed.batch.g_pixel_values) if packed.levels is None else packed.levels
        images = rows if positions is not None or packed.seg_images is None else packed.seg_images
        return self.decode_masks(self.seg_embeds(hidden[rows, columns]), levels, images)

    def seg_embeds(self, hidden: Tensor) -> Tensor:
        """Project hidden states at [SEG] (n, D) to SAM 2's prompt width: (n, C), as :meth:`decode_masks` in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.as_tensor(self.text_hidden_fcs(hidden.to(next(self.text_hidden_fcs.parameters()).dtype)))

    def decode_masks(self, seg_embeds: Tensor, levels: list[Tensor], image_index: Tensor) -> Segmentation:
        """Segment from projected [SEG] embeddings (n, C), each on the image that ``image_index`` (n,) names.

        In float32 also under autocast: in bfloat16 the gradients of this small part are up to 5 % off, and on a CPU
        torch's layer norm, which sums those of 65,536 pixels in the dtype of its input, loses nearly all of its own.
        """
        with torch.autocast(seg_embeds.device.type, enabled=False):
            finished = self.grounding.finish([level.to(seg_embeds.dtype) for level in levels])
            masks = self.grounding.decode_prompts(self.grounding.sparse_prompts(seg_embeds), finished, image_index)
        masks.seg_embeds = seg_embeds
        return masks

    @torch.no_grad()
    def predict(self, packed: PackedBatch) -> Segmentation:
        """Read packed rows as plain ids and segment their [SEG]; eval mode, no graph."""
        with evaluating(self):
            return self.segment(self.read(self.embed(packed), packed), packed)


def insert_image_tokens(
    inputs_embeds: Tensor,
    placeholder: Tensor,
    image_features: Tensor,
    region_tile: Tensor,
    prompt_masks: Tensor,
    has_images: bool = True,
) -> Tensor:
    """Put image and region tokens at the placeholders, in reading order over the flattened batch.

    A region prompt ``<vp><IMG_CONTEXT>*K</vp>`` holds K placeholders, one for each true cell of the region's mask on
    the token grid, for copies of the image's own tokens at those cells (Sa2VA's visual prompt; nothing is learned for
    it). What says where tokens go may lie on the host; then nothing waits for the device.

    Args:
        inputs_embeds: (B, L, D) token embeddings.
        placeholder: (B, L) bool, true at ``<IMG_CONTEXT>``.
        image_features: (T, M, D) projected image tokens, row-major on the G x G grid.
        region_tile: (N,) int64, the tile of each region prompt in the order in which they stand in the text; ascending
            where ``has_images``.
        prompt_masks: (N, G, G) bool; the tokens of a region are those under its true cells, row-major.
        has_images: the text holds every tile, before the regions that refer to it; else regions alone.

    Raises:
        PromptError: the number of placeholders is not the number of features (the original repeats or cuts silently),
            or the grid of the masks is not that of the image tokens.
    """
    num_tiles, tokens_per_tile, width = image_features.shape
    grid, tiles, device = prompt_masks.flatten(1).cpu().bool(), region_tile.cpu(), image_features.device
    if grid.shape[1] != tokens_per_tile:
        seen, expected = f"{grid.shape[1]} cells", f"{tokens_per_tile} image tokens"
        fix = "build the grid with the side that the model's geometry gives"
        raise PromptError(explain("the prompt grid does not fit the image tokens", "prompt_masks", seen, expected, fix))
    region, cell = grid.nonzero(as_tuple=True)
    source, expected = tiles[region] * tokens_per_tile + cell, f"{len(region)} cells of regions"
    if has_images:
        # After the tokens of a tile come those of the regions that refer to it.
        image = torch.arange(num_tiles * tokens_per_tile)
        order = torch.cat([image // tokens_per_tile * 2, tiles[region] * 2 + 1]).argsort(stable=True)
        source = torch.cat([image, source])[order]
        expected = f"{num_tiles} x {tokens_per_tile} + {expected} = {len(source)}"
    target = placeholder.flatten().nonzero()[:, 0].cpu()
    if len(target) != len(source):
        what = "image placeholders and image features differ in number"
        fix = "build the prompt from the same prompt masks that are given to the model"
        raise PromptError(explain(what, "input_ids", f"{len(target)} <IMG_CONTEXT> tokens", expected, fix))
    features = image_features.reshape(-1, width)[send(source, device)].to(inputs_embeds.dtype)
    return inputs_embeds.flatten(0, 1).index_copy(0, send(target, device), features).view_as(inputs_embeds)


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask into the additive form that every attention backend takes."""
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return torch.where(attention_mask, zero, torch.finfo(dtype).min)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode (no dropout, cache allowed) and restore the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
