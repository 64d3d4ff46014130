"""``VideoLLaVASAMModel``: InternVL with LoRA and SAM 2, joined by the hidden state at [SEG]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dual_loop.config import LossConfig, SpeedConfig
from dual_loop.errors import PromptError, explain
from dual_loop.losses import (
    chunked_token_cross_entropy,
    distillation_loss,
    kl_divergence,
    latent_alignment,
    mask_losses,
    original_mask_losses,
    policy_loss,
    sample_points,
    token_cross_entropy_from_positions,
)
from dual_loop.model.adapters import NewTokenRows
from dual_loop.model.grounding import GroundingDecoder, GroundingFeatures
from dual_loop.model.object_count import object_order
from dual_loop.model.packing import additive_mask
from dual_loop.model.soft_captions import soft_embeddings, straight_through_weights
from dual_loop.model.visual_prompt import fill_placeholders, insert_image_tokens, region_features
from dual_loop.types import LossTerm, Segmentation


class VideoLLaVASAMModel(nn.Module):
    """Sa2VA on transformers' native classes: caption a region, segment from a caption.

    Attributes:
        mllm: ``InternVLForConditionalGeneration`` with LoRA injected into its language model.
        grounding_encoder: ``Sam2Model``.
        text_hidden_fcs: Linear, ReLU, Linear from the language width D to the SAM 2 prompt width C.
        new_token_rows: trained rows of the new tokens, or None.
        group_rows: whether ``run_language`` may take rows of unlike length in several passes.
        after_loading: what :meth:`finish` calls.

    Args:
        mllm, grounding_encoder, text_hidden_fcs: the parts.
        seg_id, image_context_id: token ids of ``[SEG]`` and ``<IMG_CONTEXT>``.
        image_mean, image_std: normalisation of the grounding image, three values for 0..1 pixels.
        loss: weights, point sampling and object count of the losses that :meth:`forward` returns.
        speed: which levers are used.
        single_mask: take mask candidate 0 instead of the best of three.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        mllm: Any,
        grounding_encoder: Any,
        text_hidden_fcs: nn.Sequential,
        *,
        seg_id: int,
        image_context_id: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        loss: LossConfig | None = None,
        speed: SpeedConfig | None = None,
        single_mask: bool = False,
    ) -> None:
        super().__init__()
        self.mllm, self.grounding_encoder, self.text_hidden_fcs = mllm, grounding_encoder, text_hidden_fcs
        self.new_token_rows: NewTokenRows | None = None
        self.group_rows = True
        self.after_loading: list[Callable[[torch.device], str | None]] = []
        self.seg_id, self.image_context_id = seg_id, image_context_id
        self.loss_config, self.speed = loss or LossConfig(), speed or SpeedConfig()
        self.grounding = GroundingDecoder(grounding_encoder, single_mask)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    def finish(self, device: torch.device) -> list[str]:
        """Do what waits for loaded weights and for ``device``, where they are; return lines to print.

        Frozen matrices may be no parameters any more after it.
        """
        lines = [run(device) for run in self.after_loading]
        return [line for line in lines if line is not None]

    @property
    def device(self) -> torch.device:
        return self.image_mean.device

    @property
    def _fcs_dtype(self) -> torch.dtype:
        return next(self.text_hidden_fcs.parameters()).dtype

    @property
    def mask_size(self) -> int:
        """Q, the side of the mask logits."""
        return int(self.grounding_encoder.prompt_encoder.mask_input_size[0])

    # ---- images ----------------------------------------------------------------------------------------------------

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower: (T, 3, I, I) -> (T, M, D_vision), pixel-shuffled, before the projector.

        No graph is kept where the tower is frozen, so the result may be shared by both steps of the loop.
        """
        tower, config = self.mllm.model.vision_tower, self.mllm.config
        self._check_tiles(pixel_values, tower)
        trains = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            dtype = next(tower.parameters()).dtype
            hidden = tower(pixel_values=pixel_values.to(dtype), return_dict=True).last_hidden_state[:, 1:]
            side = int(hidden.shape[1] ** 0.5)
            grid = hidden.reshape(len(hidden), side, side, -1)
            shuffled = self.mllm.model.pixel_shuffle(grid, scale_factor=config.downsample_ratio)
        return torch.as_tensor(shuffled.flatten(1, 2))

    def project_vision(self, features: Tensor) -> Tensor:
        """Run the projector ``mlp1``: (T, M, D_vision) -> (T, M, D), row-major on the G x G token grid."""
        projector = self.mllm.model.multi_modal_projector
        return torch.as_tensor(projector(features.to(projector.linear_1.weight.dtype)))

    def encode_grounding(self, g_pixel_values: Tensor) -> GroundingFeatures:
        """Run SAM 2's image encoder on (B, 3, S, S) uint8 pixels (0..255), normalised here."""
        pixels = (g_pixel_values.float() / 255.0 - self.image_mean) / self.image_std
        return self.grounding.encode(pixels.to(self.grounding_encoder.dtype))

    def _check_tiles(self, pixel_values: Tensor, tower: Any) -> None:
        expected = tower.config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[-2:]) != tuple(expected):
            raise PromptError(
                explain(
                    "image tiles have the wrong size",
                    seen=tuple(pixel_values.shape),
                    expected=f"(T, 3, {expected[0]}, {expected[1]})",
                    fix="prepare images with the model's own geometry (model.build.geometry)",
                )
            )

    # ---- language --------------------------------------------------------------------------------------------------

    def embed_prompt(
        self, input_ids: Tensor, image_features: Tensor, region_tile: Tensor, prompt_masks: Tensor
    ) -> Tensor:
        """Embed token ids (B, L) and put image and region tokens in place (``visual_prompt.insert_image_tokens``)."""
        embedded = self.mllm.get_input_embeddings()(input_ids)
        if self.new_token_rows is not None:
            embedded = self.new_token_rows.embed(input_ids, embedded)
        placeholder = input_ids == self.image_context_id
        return insert_image_tokens(embedded, placeholder, image_features, region_tile, prompt_masks)

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
            read_from: columns of packed rows before it may come back as zeros.
            row_lengths: real columns of packed rows; what is behind them may come back as zeros.
        """
        if attention_mask.dim() == 4:
            attention_mask = additive_mask(attention_mask, embeds.dtype)
        output = self.mllm.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=not self.speed.last_hidden_only,
        )
        self._all_hidden_states = output.hidden_states  # None, unless the lever is off: then kept as Sa2VA keeps them
        return torch.as_tensor(output.last_hidden_state)

    def step_language(self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Cache) -> Tensor:
        """Run new columns behind what ``cache`` holds; return the last one's hidden states (R, D), after the norm.

        Args:
            embeds: (R, n, D).
            mask: (R, 1, n, columns) additive, or None where every column is seen.
            position_ids: (R, n) int64.
            cache: the new keys and values are appended.
        """
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids}
        output = self.mllm.model.language_model(**given, past_key_values=cache, use_cache=True)
        return torch.as_tensor(output.last_hidden_state[:, -1])

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (P, V) of chosen hidden states (P, D)."""
        logits = self.mllm.lm_head(hidden)
        if self.new_token_rows is not None:
            logits = self.new_token_rows.logits(hidden, logits)
        return torch.as_tensor(logits)

    def language_loss(self, hidden: Tensor, labels: Tensor) -> LossTerm:
        """Token cross-entropy at the positions that carry loss; only their logits are computed."""
        weight = self.loss_config.language_weight
        if not self.speed.loss_positions_only:
            logits = self.answer_logits(hidden[:, :-1].flatten(0, 1)).float()
            return token_cross_entropy_from_positions(logits, labels[:, 1:].flatten(), weight)
        carries = labels[:, 1:] != -100
        return self.token_loss(hidden[:, :-1][carries], labels[:, 1:][carries], weight)

    def token_loss(self, hidden: Tensor, labels: Tensor, weight: float = 1.0) -> LossTerm:
        """Cross-entropy of labels (P,) at hidden states (P, D), a chunk of logits at a time."""
        chunk = self.speed.cross_entropy_chunk
        return chunked_token_cross_entropy(self.answer_logits, hidden, labels, chunk, weight)

    @torch.no_grad()
    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Continue left-padded prompts with a key-value cache: (R, L, D) -> (R, new tokens) int64, new tokens only."""
        self.sync_new_tokens()
        output = self.mllm.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        return torch.as_tensor(getattr(output, "sequences", output))

    def embed_regions(
        self, input_ids: Tensor, image_features: Tensor, region_tile: Tensor, prompt_masks: Tensor
    ) -> Tensor:
        """Embed questions (R, L) whose only placeholders are those of their region prompts, row by row.

        Args:
            image_features: (T, M, D). region_tile: (R,) int64. prompt_masks: (R, G, G) bool.
        """
        embedded = self.mllm.get_input_embeddings()(input_ids)
        if self.new_token_rows is not None:
            embedded = self.new_token_rows.embed(input_ids, embedded)
        features = region_features(image_features, region_tile, prompt_masks)
        return fill_placeholders(embedded, input_ids == self.image_context_id, features)

    def sync_new_tokens(self) -> None:
        """Write trained rows of new tokens into the embedding tables, which generation and export read."""
        if self.new_token_rows is not None:
            self.new_token_rows.write_back(self.mllm.get_input_embeddings(), self.mllm.lm_head)

    # ---- both ------------------------------------------------------------------------------------------------------

    def forward(self, data: Mapping[str, Any], mode: str = "loss") -> dict[str, Any]:
        """Segment every [SEG] of a batch and compute the losses.

        Args:
            data: the model's inputs. ``input_ids`` (B, L); ``attention_mask`` (B, L) or, for packed rows,
                (B, 1, L, L); ``position_ids`` (B, L) or absent; ``labels`` (B, L), -100 where no loss;
                ``pixel_values`` (T, 3, I, I), (B, tiles, 3, I, I) or a list of (tiles, 3, I, I), or instead
                ``vision_features`` (T, M, D_vision) from :meth:`encode_vision`; ``g_pixel_values`` (B, 3, S, S) uint8;
                ``masks``: a list of B (n, H, W) masks or one (N, Q, Q) tensor, in the order of the [SEG] tokens.
                Region prompts, either as in Sa2VA: ``prompt_masks`` a list of (n, G, G) for the tiles where
                ``vp_overall_mask`` (T,) is 1; or ``prompt_masks`` (P, G, G) with ``region_tile`` (P,).
                Optional: ``read_from``, the first column of packed rows whose hidden state is read (0), and
                ``row_lengths``, their columns without padding;
                ``region_seeds`` (N,) int64 (points of the mask loss), ``region_weights`` (N,) float for
                ``"terms"``, ``point_coords`` (N, points, 2), ``object_order`` for ``"loss"``; ``grounding_features``
                of :meth:`encode_grounding`, where they are at hand; ``row_image`` (B,) int64, where rows do not segment
                the images in their order; ``captioning``, inputs of :meth:`soft_captions` with the places
                ``into_rows, into_columns`` (P,) of its embeddings. For ``"terms"`` also ``policy``
                (:meth:`token_log_probs`, with ``advantages``, ``weight``, ``kl_weight``, ``reference_log_probs``),
                ``teacher`` (``probabilities`` (N, Q, Q), ``weights`` (N,)) and ``align_targets`` (N, C).
            mode: ``"loss"``: ``loss_mask``, ``loss_dice``, ``llm_loss`` with the names, weights and averages of Sa2VA
                over this batch alone; with ``loss.num_objects`` K, the N objects become K an image, in the order
                ``object_order`` (B * K,) or else by ``object_count.object_order``, and ``point_coords`` are theirs.
                ``"terms"``: ``terms`` (sums and counts of the N objects) and ``segmentation``.
                ``"predict"``: ``segmentation`` alone.

        Raises:
            PromptError: the numbers of [SEG] tokens, masks, placeholders and features do not fit together.
        """
        if mode not in ("loss", "terms", "predict"):
            raise PromptError(explain("unknown forward mode", seen=mode, expected="loss, terms or predict"))
        if data.get("grounding_features") is None:
            # Before the language model, whose graph would be alive beside all that the encoder needs for a moment.
            data = {**data, "grounding_features": self.encode_grounding(data["g_pixel_values"])}
        hidden = self.hidden_states(data)
        if mode == "loss":
            return {**self._original_losses(data, hidden), "llm_loss": self.language_loss(hidden, data["labels"]).mean}
        segmentation = self._segment(data, hidden)
        if mode == "predict":
            return {"segmentation": segmentation}
        return {"terms": self._loss_terms(data, hidden, segmentation), "segmentation": segmentation}

    def hidden_states(self, data: Mapping[str, Any]) -> Tensor:
        """Run the vision-language part of :meth:`forward`: last hidden states (B, L, D), from ``read_from`` on."""
        rows = (data["attention_mask"], data.get("position_ids"), data.get("read_from", 0), data.get("row_lengths"))
        return self.run_language(self.input_embeddings(data), *rows)

    def input_embeddings(self, data: Mapping[str, Any]) -> Tensor:
        """Return what enters the language model in :meth:`forward`: (B, L, D), image and region tokens in place."""
        features = data.get("vision_features")
        if features is None:
            features = self.encode_vision(_flatten_tiles(data["pixel_values"]))
        image_features = self.project_vision(features)
        region_tile, prompt_masks = self._region_prompts(data, len(image_features), image_features.shape[1])
        embedded = self.embed_prompt(data["input_ids"], image_features, region_tile, prompt_masks)
        if "captioning" not in data:
            return embedded
        soft = data["captioning"]
        values = self.soft_captions(soft).to(embedded.dtype)
        return embedded.index_put((_on(soft["into_rows"], embedded), _on(soft["into_columns"], embedded)), values)

    def soft_captions(self, data: Mapping[str, Any]) -> Tensor:
        """Run captioning rows with graph and return straight-through embeddings of P of their tokens: (P, D).

        The values are those of the tokens' own embeddings; the gradient goes to the logits that chose the tokens.

        Args:
            data: inputs of the captioning rows as in :meth:`forward`, with ``rows, columns, targets`` (P,) of
                :meth:`token_log_probs`; ``uniform`` (P, top_k + 1) in 0..1; ``is_first`` (P,) bool, tokens that are
                read as ``with_space`` (V,) says; ``temperature``, ``top_k``.
        """
        hidden = self.hidden_states({key: value for key, value in data.items() if key != "captioning"})
        chosen = hidden[_on(data["rows"], hidden), _on(data["columns"], hidden)]
        ids, weights = straight_through_weights(
            *(self.answer_logits(chosen), _on(data["targets"], hidden), _on(data["uniform"], hidden)),
            *(data["temperature"], data["top_k"]),
        )
        spaced = _on(data["with_space"], hidden)[ids.clamp_max(len(data["with_space"]) - 1)]
        table = self.mllm.get_input_embeddings().weight.detach()
        return soft_embeddings(table, torch.where(_on(data["is_first"], hidden)[:, None], spaced, ids), weights)

    def token_log_probs(self, hidden: Tensor, policy: Mapping[str, Any]) -> Tensor:
        """Return the log-probabilities (P,) float32 of chosen tokens.

        Args:
            hidden: (B, L, D) last hidden states.
            policy: ``rows, columns`` (P,) int64, where the tokens are predicted; ``targets`` (P,) int64;
                ``temperature`` at which they were sampled.
        """
        chosen = hidden[_on(policy["rows"], hidden), _on(policy["columns"], hidden)]
        log_probs = (self.answer_logits(chosen).float() / policy["temperature"]).log_softmax(-1)
        return torch.as_tensor(log_probs.gather(1, _on(policy["targets"], hidden)[:, None])[:, 0])

    def _region_prompts(self, data: Mapping[str, Any], num_tiles: int, num_cells: int) -> tuple[Tensor, Tensor]:
        """Return ``region_tile`` (P,) and ``prompt_masks`` (P, G, G) from either of the two accepted forms."""
        masks = data.get("prompt_masks")
        if isinstance(masks, Tensor):
            return data["region_tile"], masks
        if not masks:
            side = int(num_cells**0.5)
            empty = torch.zeros(0, dtype=torch.long, device=self.device)
            return empty, torch.zeros(0, side, side, dtype=torch.bool, device=self.device)
        tiles = (data["vp_overall_mask"] > 0).nonzero().flatten()
        if len(tiles) != len(masks):
            raise PromptError(
                explain("vp_overall_mask and prompt_masks differ", seen=f"{len(tiles)} tiles", expected=len(masks))
            )
        counts = torch.tensor([len(mask) for mask in masks], device=tiles.device)
        return tiles.repeat_interleave(counts), torch.cat([mask.bool() for mask in masks])

    def _segment(self, data: Mapping[str, Any], hidden: Tensor, order: Tensor | None = None) -> Segmentation:
        """Segment the N objects at the [SEG] tokens, or those of them that ``order`` names, as often as it does."""
        row, column = (data["input_ids"] == self.seg_id).nonzero(as_tuple=True)
        seg_embeds = self.text_hidden_fcs(hidden[row, column].to(self._fcs_dtype))
        if order is not None:
            row, seg_embeds = row[order], seg_embeds[order]
        levels = self.grounding.finish(data["grounding_features"])
        image = _on(data["row_image"], row)[row] if "row_image" in data else row
        segmentation = self.grounding.decode(seg_embeds, levels, image)
        segmentation.seg_embeds = seg_embeds
        return segmentation

    def _loss_terms(self, data: Mapping[str, Any], hidden: Tensor, segmentation: Segmentation) -> dict[str, LossTerm]:
        targets, seeds = self._targets(data)
        terms = mask_losses(
            segmentation.mask_logits,
            targets,
            seeds,
            self.loss_config,
            point_coords=data.get("point_coords"),
            object_weights=data.get("region_weights"),
        )
        terms["llm_loss"] = self.language_loss(hidden, data["labels"])
        return {**terms, **self._learning_terms(data, hidden, segmentation)}

    def _learning_terms(
        self, data: Mapping[str, Any], hidden: Tensor, segmentation: Segmentation
    ) -> dict[str, LossTerm]:
        """Return the terms of options: policy, divergence, distillation, alignment; those whose inputs are given."""
        terms, config = {}, self.loss_config
        if "policy" in data:
            policy = data["policy"]
            log_probs = self.token_log_probs(hidden, policy)
            terms["policy_loss"] = policy_loss(log_probs, _on(policy["advantages"], hidden), policy["weight"])
            if "reference_log_probs" in policy:
                terms["kl_loss"] = kl_divergence(log_probs, policy["reference_log_probs"], policy["kl_weight"])
        if "teacher" in data:
            teacher = data["teacher"]
            terms["distill_loss"] = distillation_loss(
                *(segmentation.mask_logits, teacher["probabilities"], teacher["weights"]),
                *(config.distill_weight, config.distill_confidence),
            )
        if "align_targets" in data:
            embeds = segmentation.seg_embeds
            if config.align_through == "projection":
                row, column = (data["input_ids"] == self.seg_id).nonzero(as_tuple=True)
                embeds = self.text_hidden_fcs(hidden.detach()[row, column].to(self._fcs_dtype))
            assert embeds is not None  # masks of this model always come from [SEG] embeddings
            weights = data.get("region_weights")
            terms["align_loss"] = latent_alignment(embeds, data["align_targets"], config.align_weight, weights)
        return terms

    def _original_losses(self, data: Mapping[str, Any], hidden: Tensor) -> dict[str, Tensor]:
        """Return ``loss_mask`` and ``loss_dice`` of mode ``"loss"``; zeros with graph where there is no object."""
        if data.get("region_weights") is not None:
            raise PromptError(explain("weights of regions belong to another mode", "region_weights", "loss", "terms"))
        targets, seeds = self._targets(data)
        order = self._object_order(data, seeds)
        if order is not None:
            targets, seeds = targets[order], seeds[order.to(seeds.device)]
        logits = self._segment(data, hidden, order).mask_logits
        if not len(logits):
            return {"loss_mask": logits.sum() * 0.0, "loss_dice": logits.sum() * 0.0}
        config, points = self.loss_config, data.get("point_coords")
        if points is None and config.num_points > 0:
            ratios = config.oversample_ratio, config.importance_sample_ratio
            points = sample_points(logits, _different(seeds), config.num_points, *ratios)
        return original_mask_losses(logits, targets, config, points)

    def _object_order(self, data: Mapping[str, Any], seeds: Tensor) -> Tensor | None:
        if self.loss_config.num_objects is None or not len(seeds):
            return None
        if data.get("object_order") is not None:
            return torch.as_tensor(data["object_order"]).to(self.device)
        row, _ = (data["input_ids"] == self.seg_id).nonzero(as_tuple=True)
        return object_order(row, len(data["input_ids"]), self.loss_config.num_objects, seeds)

    def _targets(self, data: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return target masks (N, Q, Q) and seeds (N,), one of each for every [SEG]."""
        targets = _resized_targets(data["masks"], self.mask_size, self.device)
        num_objects = int((data["input_ids"] == self.seg_id).sum())
        if len(targets) != num_objects:
            raise PromptError(
                explain(
                    "every [SEG] needs one mask",
                    seen=f"{num_objects} [SEG] tokens and {len(targets)} masks",
                    fix="build one segmentation turn for each target mask",
                )
            )
        seeds = data.get("region_seeds")
        return targets, torch.arange(len(targets)) if seeds is None else seeds


def _on(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device)


def _flatten_tiles(pixel_values: Tensor | Sequence[Tensor]) -> Tensor:
    """Accept the original's list of (tiles, 3, I, I) and 5-D tensor besides (T, 3, I, I)."""
    if isinstance(pixel_values, Tensor):
        return pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
    return torch.cat(list(pixel_values))


def _different(seeds: Tensor) -> Tensor:
    """Give the repetitions of an object points of their own: the k-th adds k to its seed."""
    seen: dict[int, int] = {}
    values = []
    for seed in seeds.tolist():
        values.append((seed + seen.get(seed, 0)) % 2**63)
        seen[seed] = seen.get(seed, 0) + 1
    return torch.tensor(values, dtype=torch.long)


def _resized_targets(masks: Tensor | Sequence[Tensor], side: int, device: torch.device) -> Tensor:
    """Bring target masks to (N, Q, Q) by nearest neighbour, without padding."""
    if isinstance(masks, Tensor):
        return masks.to(device)
    resized = [F.interpolate(mask[None].float(), size=(side, side), mode="nearest")[0] for mask in masks]
    return torch.cat(resized).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Put ``model`` into eval mode (no dropout, cache allowed) and restore the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
