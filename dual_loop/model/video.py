"""SAM 2's memory: what a text names on the first frames of a clip is found again on all others, as Sa2VA does it.

Every prompted frame is segmented from the [SEG] embeddings alone, as a single image is (``GroundingDecoder``). A later
frame is not prompted: memory attention reads what the memory encoder made of the prompted frames and of the last six,
with object pointers of the prompted frames and of the last 15. Training has no use for these parts, so they are no part
of ``Sa2VA``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.initialization import no_init_weights
from transformers.models.sam2_video.modeling_sam2_video import (
    Sam2VideoImageSegmentationOutput,
    Sam2VideoInferenceSession,
)

from dual_loop.errors import CheckpointError, explain, listed
from dual_loop.model.sa2va import Sa2VA

SHARED = ("vision_encoder.", "mask_decoder.", "prompt_encoder.", "shared_image_embedding.", "no_memory_embedding")
"""What Sam2VideoModel has in common with Sam2Model; the tracker takes it from its model."""
TIME, OCCLUSION = "temporal_positional_encoding_projection_layer.", "occlusion_spatial_embedding_parameter"
"""What SAM 2.1 added to the memory of SAM 2, whose weights Sa2VA has."""


class Tracker(Sam2VideoModel):  # type: ignore[misc]
    """The memory of one model: 7.5 million parameters beside SAM 2 large.

    Args:
        model: encodes frames, and decodes masks; it is looked at and not changed.
        weights: by the names of Sam2VideoModel (``checkpoint.exporter.collect_video``); None draws them, which is for
            tests and for the embedded model.

    Raises:
        CheckpointError: weights are missing or do not fit; all are listed.
    """

    def __init__(self, model: Sa2VA, weights: Mapping[str, Tensor] | None) -> None:
        sam, width = model.grounding_encoder, int(model.grounding_encoder.config.vision_config.fpn_hidden_size)
        given, size = weights or {}, int(sam.prompt_encoder.input_image_size)
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        config = Sam2VideoConfig(
            **{name: getattr(sam.config, name).to_dict() for name in parts},
            image_size=size,
            memory_attention_hidden_size=width,
            memory_attention_rope_feat_sizes=list(sam.prompt_encoder.image_embedding_size),
            memory_encoder_hidden_size=width,
            mask_downsampler_embed_dim=width,
            memory_fuser_embed_dim=width,
            memory_fuser_intermediate_dim=4 * width,
            enable_temporal_pos_encoding_for_object_pointers=any(name.startswith(TIME) for name in given),
            enable_occlusion_spatial_embedding=OCCLUSION in given,
        )
        with nullcontext() if weights is None else no_init_weights():
            super().__init__(config)
        del self.vision_encoder, self.mask_decoder, self.shared_image_embedding
        self.prompt_encoder, self.no_memory_embedding = sam.prompt_encoder, sam.no_memory_embedding
        # A list, so that the model does not become a part of this one.
        self._models, self._prompts = [model], iter(())
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(SHARED)}
        if weights is not None:
            problems = [f"missing {name}" for name in own if name not in weights]
            problems += [f"unknown {name}" for name in weights if name not in own]
            shapes = {name: (tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights}
            problems += [
                f"{name}: {seen}, expected {wanted}" for name, (seen, wanted) in shapes.items() if seen != wanted
            ]
            if problems:
                what, fix = "weights of SAM 2's video memory do not fit", "give --sam2_path, SAM 2 of the same size"
                raise CheckpointError(explain(what, seen=listed(problems), expected=f"{len(own)} tensors", fix=fix))
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(weights[name])
        self.num_tensors = len(own)
        self.eval().to(device=model.device)

    @torch.no_grad()
    def track(self, frames: Iterable[Tensor], count: int, prompts: Tensor, prompted: int) -> Iterator[Tensor]:
        """Segment O objects on a clip, one frame after the other; neither frames nor their features are kept.

        Args:
            frames: ``count`` of (3, S, S) pixels of 0..255, read as they are needed.
            prompts: (O, C) float32 embeddings at [SEG] (``Sa2VA.seg_embeds``), O >= 1.
            prompted: the first frames, 1 or more, on which they prompt.

        Yields:
            (O, Q, Q) float32 mask logits of the next frame.
        """
        [model], device = self._models, prompts.device
        session: Any = Sam2VideoInferenceSession(
            inference_device=device, inference_state_device=device, dtype=torch.float32
        )
        session.processed_frames = range(count)  # it asks for their number alone: features are put into its cache
        for number in range(len(prompts)):
            session.obj_id_to_idx(number)
        for number, pixels in enumerate(frames):
            levels = model.encode_grounding(pixels[None].to(device))
            fine, middle, _ = model.grounding.finish(levels)
            coarse = levels[2]
            position = model.grounding_encoder.vision_encoder.neck.position_encoding
            maps = [level.flatten(2).permute(2, 0, 1) for level in (fine, middle, coarse)]
            places = position(coarse.shape, device, coarse.dtype).flatten(2).permute(2, 0, 1)
            session.cache.cache_vision_features(number, {"vision_feats": maps, "vision_pos_embeds": [places]})
            is_prompted = number < prompted
            session.obj_with_new_inputs = list(session.obj_ids) if is_prompted else []
            self._prompts = iter(prompts.split(1) if is_prompted else ())
            yield self(session, frame_idx=number).pred_masks[:, 0].float()
            for outputs in session.output_dict_per_obj.values():
                for kept in outputs.values():
                    kept.get(number, {}).pop("high_res_masks", None)
                outputs["non_cond_frame_outputs"].pop(number - self.config.max_object_pointers_in_encoder, None)

    def _single_frame_forward(  # type: ignore[override]
        self, *, image_embeddings: list[Tensor], **_: object
    ) -> Sam2VideoImageSegmentationOutput:
        """Decode one object on one frame, (1, C, Q', Q') its coarsest level with memory, as :class:`Sa2VA` does.

        Unlike transformers' own, a mask stays where the object score is not positive; its pointer does not (as Sa2VA).
        """
        prompt = next(self._prompts, None)
        with torch.autocast(image_embeddings[0].device.type, enabled=False):
            levels = [level.float() for level in image_embeddings]
            grounding, first = self._models[0].grounding, torch.zeros(1, dtype=torch.long, device=levels[0].device)
            sparse = grounding.sparse_prompts(levels[0].new_zeros(1, self.hidden_dim) if prompt is None else prompt)
            sparse = sparse[:, :, :2] if prompt is None else sparse
            masks, ious, scores, tokens = grounding.decode_candidates(sparse, levels, first)
            best = ious.argmax(dim=1)
            pointer = self.object_pointer_proj(tokens[first, best])
            mask = masks[first, best][:, None]
            return Sam2VideoImageSegmentationOutput(
                pred_masks=mask,
                high_res_masks=F.interpolate(mask, scale_factor=4.0, mode="bilinear"),
                object_pointer=torch.where(scores > 0, pointer, self.no_object_pointer),
                object_score_logits=scores[:, None],
            )
