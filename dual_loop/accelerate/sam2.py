"""SAM 2's frozen image encoder without what nobody reads; the feature maps are the same bits or rounding.

transformers 5.23 computes two things in the encoder that are thrown away here: in every attention block a product of
queries and keys over the heads, with its softmax, and for every level of the neck a sine position encoding as large as
the level (single images need none: the mask decoder has its own). On a CPU they are a third of the encoder's time.

The neck brings the two finest levels to its width with a 1 x 1 convolution, and nothing but another 1 x 1 convolution
of the mask decoder reads them: two linear maps in a row, of which the second trains. :class:`LeanNeck` hands out what
is before the first, and :func:`read_level` multiplies the two matrices instead of the maps: an eighth of the
operations for SAM 2 large, and features of 144 and 288 instead of 256 and 256 channels to keep.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, Sam2VisionNeck, do_pool

from dual_loop.accelerate import replace
from dual_loop.config import Config, precision
from dual_loop.model.sa2va import GroundingDecoder, Sa2VA

HIGH_RESOLUTION = 2
"""Levels that the mask decoder reads through a convolution of its own: the finest two."""


def apply(model: Sa2VA, config: Config) -> None:
    """Make the encoder lean, and let the grounding finish what its neck leaves open."""
    encoder = model.grounding_encoder.vision_encoder
    for module in encoder.modules():
        if type(module) is Sam2MultiScaleAttention and module.config._attn_implementation == "sdpa":
            module.__class__ = LeanAttention
    if type(encoder.neck) is Sam2VisionNeck:
        encoder.neck.__class__ = LeanNeck
    replace(model.grounding, finish, level_width)
    model.after_loading.append(partial(cast_trunk, model, config))


def cast_trunk(model: Sa2VA, config: Config, device: torch.device) -> None:
    """Keep the frozen trunk's matrices in bfloat16 on a GPU that computes in it: autocast would cast them each step."""
    trunk = model.grounding_encoder.vision_encoder.backbone
    if device.type == "cpu" or precision(config) != "bf16" or any(p.requires_grad for p in trunk.parameters()):
        return
    for module in trunk.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    replace(trunk, forward)


def forward(trunk: nn.Module, pixel_values: Tensor, **options: object) -> object:
    """The trunk's forward pass in autocast, whatever is around it: its matrices take nothing but bfloat16."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16):
        return type(trunk).forward(trunk, pixel_values, **options)


def finish(grounding: GroundingDecoder, levels: list[Tensor]) -> list[Tensor]:
    """``GroundingDecoder.finish``, where levels may come as the trunk left them."""
    decoder, neck = grounding.sam.mask_decoder, grounding.sam.vision_encoder.neck
    fine, middle, coarse = levels
    coarse = coarse + grounding.sam.no_memory_embedding.reshape(1, -1, 1, 1)
    return [read_level(neck, 0, decoder.conv_s0, fine), read_level(neck, 1, decoder.conv_s1, middle), coarse]


def level_width(grounding: GroundingDecoder, level: int) -> int:
    """``GroundingDecoder.level_width``: an open level is as narrow as the trunk."""
    neck = grounding.sam.vision_encoder.neck
    is_open = level in getattr(neck, "open_levels", ())
    return int(neck.lateral(level).in_channels if is_open else neck.config.fpn_hidden_size)


class LeanAttention(Sam2MultiScaleAttention):  # type: ignore[misc]
    """Hiera's attention inside windows, (B, H, W, C) -> (B, H', W', C'); queries are pooled where a stage begins."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        rows, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        query, key, value = self.qkv(hidden_states).reshape(rows, height * width, 3, heads, -1).unbind(2)
        if self.query_stride:
            stride: Any = self.query_stride  # a pair, whatever its hint says
            pooled = do_pool(query.reshape(rows, height, width, -1), stride)
            height, width = pooled.shape[1:3]
            query = pooled.reshape(rows, height * width, heads, -1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return torch.as_tensor(self.proj(attended.transpose(1, 2).reshape(rows, height, width, -1)))


class LeanNeck(Sam2VisionNeck):  # type: ignore[misc]
    """The neck without the convolutions that :func:`read_level` makes up for."""

    @property
    def open_levels(self) -> tuple[int, ...]:
        """The levels, 0 the finest, that come out as the trunk left them: frozen, 1 x 1, nothing added from above."""
        first = min([HIGH_RESOLUTION, *(self.fpn_top_down_levels or [])])
        return tuple(level for level in range(first) if _is_linear(self.lateral(level)))

    def lateral(self, level: int) -> nn.Conv2d:
        """Return the convolution of a level; the first one is that of the coarsest."""
        return cast(nn.Conv2d, self.convs[len(self.convs) - 1 - level])

    def forward(self, hidden_states: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the levels (B, C, H, W), coarse to fine, and zeros in place of position encodings."""
        maps: list[Tensor] = []
        above: Tensor | None = None
        opened = self.open_levels
        for level in reversed(range(len(self.convs))):
            given = hidden_states[level].permute(0, 3, 1, 2)
            if level in opened:
                # Rounded once to the dtype in which autocast will read it, and half as large.
                kind = given.device.type
                maps.append(given.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else given)
                continue
            lateral = self.lateral(level)
            found = lateral(given.to(lateral.weight.dtype))
            if above is not None and level in (self.fpn_top_down_levels or []):
                found = found + F.interpolate(above.float(), scale_factor=2.0, mode="nearest").to(found.dtype)
            above = found
            maps.append(found)
        return tuple(maps), tuple(values.new_zeros(()).expand_as(values) for values in maps)


def read_level(neck: Any, level: int, convolution: nn.Conv2d, values: Tensor) -> Tensor:
    """Apply the mask decoder's 1 x 1 ``convolution`` to a level (B, C, H, W) of ``neck``: (B, C', H, W).

    An open level passes both convolutions as one, whose matrix is their product: the same values, and the same
    gradients of ``convolution``, up to rounding. The product is taken in float32 also under autocast.
    """
    if level not in getattr(neck, "open_levels", ()):
        return torch.as_tensor(convolution(values))
    first: Any = neck.lateral(level)
    with torch.autocast(values.device.type, enabled=False):
        outer = convolution.weight.flatten(1)
        matrix = outer @ first.weight.flatten(1).to(outer.dtype)
        bias = F.linear(first.bias.to(outer.dtype), outer, convolution.bias)
    dtype = values.dtype if torch.is_autocast_enabled(values.device.type) else matrix.dtype
    return F.linear(values.permute(0, 2, 3, 1).to(dtype), matrix, bias).permute(0, 3, 1, 2)


def _is_linear(layer: nn.Conv2d) -> bool:
    plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return plain and layer.bias is not None and not any(p.requires_grad for p in layer.parameters())
