"""From [SEG] embeddings to masks with transformers' SAM 2, as Sa2VA does it on single frames.

Three things differ from SAM 2's own point-prompt path: the sparse prompt is two "not a point" tokens followed by the
language embedding, the image features carry the learned no-memory embedding (memory attention is not run), and masks
are never replaced where the object score is not positive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dual_loop.types import Segmentation


class GroundingDecoder:
    """Runs a ``Sam2Model``: frozen encoder without graph, convolutions and mask decoder with graph.

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
        trains = any(parameter.requires_grad for parameter in encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            maps = encoder(pixels, return_dict=True).fpn_hidden_states
        return list(maps)

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

    def decode(self, seg_embeds: Tensor, levels: list[Tensor], image_index: Tensor) -> Segmentation:
        """Segment N objects on their images.

        Args:
            seg_embeds: (N, C).
            levels: what :meth:`finish` returns, for B images.
            image_index: (N,) int64, the image of each object.

        Returns:
            The chosen masks as logits (N, Q, Q), with predicted IoUs, choices and object scores.
        """
        return self.decode_prompts(self.sparse_prompts(seg_embeds), levels, image_index)

    def decode_prompts(self, sparse: Tensor, levels: list[Tensor], image_index: Tensor) -> Segmentation:
        """:meth:`decode` for ready sparse prompts (N, 1, P, C), such as SAM 2's own point prompts."""
        masks, ious, scores = self.decode_candidates(sparse, levels, image_index)
        if self.single_mask:
            chosen = torch.zeros(len(masks), dtype=torch.long, device=masks.device)
        else:
            chosen = ious.argmax(dim=-1)
        picked = masks[torch.arange(len(masks), device=masks.device), chosen]
        return Segmentation(picked.float(), ious, chosen, scores)

    def decode_candidates(
        self, sparse: Tensor, levels: list[Tensor], image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all candidate logits (N, 3 or 1, Q, Q), predicted IoUs (N, 3 or 1) and object scores (N, 1)."""
        fine, middle, coarse = (level[image_index] for level in levels)
        dense = self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(coarse)
        positions = self.sam.get_image_wide_positional_embeddings().to(coarse.dtype).expand(len(sparse), -1, -1, -1)
        masks, ious, _, scores = self.sam.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=not self.single_mask,
            high_resolution_features=[fine, middle],
        )
        return masks[:, 0], ious[:, 0], scores[:, 0]

    def point_prompts(self, points: Tensor) -> Tensor:
        """SAM 2's own prompt for one positive point an object: (N, 2) pixels in 0..S -> (N, 1, 2, C)."""
        labels = torch.ones(len(points), 1, 1, dtype=torch.long, device=points.device)
        sparse, _ = self.sam.prompt_encoder(points[:, None, None], labels, None, None)
        return torch.as_tensor(sparse)

    def box_prompts(self, boxes: Tensor) -> Tensor:
        """SAM 2's own prompt for one box an object: (N, 4) x1, y1, x2, y2 pixels in 0..S -> (N, 1, 2 or 3, C)."""
        sparse, _ = self.sam.prompt_encoder(None, None, boxes[:, None], None)
        return torch.as_tensor(sparse)
