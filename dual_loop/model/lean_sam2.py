"""SAM 2's frozen image encoder without what nobody reads; the feature maps are the same bits or rounding.

transformers 5.23 computes two things in the encoder that are thrown away here: in every attention block a product of
queries and keys over the heads, with its softmax, and for every level of the neck a sine position encoding as large as
the level (single images need none: the mask decoder has its own). On a CPU they are a third of the encoder's time.

Blocks whose attention stays inside windows are run on one band of window rows after the other: what lies between two
matrix products then stays in the processor's cache, and only one band's worth of it exists at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, Sam2MultiScaleBlock, do_pool

BAND_TOKENS = 8192
"""Most tokens of all images in a band, unless one row of windows has more."""


class LeanAttention(Sam2MultiScaleAttention):  # type: ignore[misc]
    """Hiera's attention inside windows, (B, H, W, C) -> (B, H', W', C'); queries are pooled where a stage begins."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        rows, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        query, key, value = self.qkv(hidden_states).reshape(rows, height * width, 3, heads, -1).unbind(2)
        if self.query_stride:
            stride: Any = self.query_stride
            pooled = do_pool(query.reshape(rows, height, width, -1), stride)
            height, width = pooled.shape[1:3]
            query = pooled.reshape(rows, height * width, heads, -1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return torch.as_tensor(self.proj(attended.transpose(1, 2).reshape(rows, height, width, -1)))


class BandedBlock(Sam2MultiScaleBlock):  # type: ignore[misc]
    """A block of Hiera, (B, H, W, C) -> (B, H', W', C'), run band by band on a CPU where no graph is kept."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        rows = band_height(hidden_states.shape, self.window_size)
        is_banded = hidden_states.device.type == "cpu" and not torch.is_grad_enabled()
        if not is_banded or rows >= hidden_states.shape[1]:
            return torch.as_tensor(super().forward(hidden_states, **kwargs))
        bands = hidden_states.split(rows, dim=1)
        first = torch.as_tensor(super().forward(bands[0].contiguous(), **kwargs))
        pooled = rows // first.shape[1]
        output = first.new_empty(len(first), hidden_states.shape[1] // pooled, *first.shape[2:])
        output[:, : first.shape[1]] = first
        for number, band in enumerate(bands[1:], start=1):
            start = number * first.shape[1]
            output[:, start : start + band.shape[1] // pooled] = super().forward(band.contiguous(), **kwargs)
        return output


def band_height(shape: Any, window: int) -> int:
    """Return the rows of a band of a map (B, H, W, C): H where attention is global or windows do not fill the map."""
    images, height, width, _ = shape
    if window == 0 or height % window or width % window:
        return int(height)
    return int(window * max(1, BAND_TOKENS // (images * width * window)))


class NoPositions(nn.Module):
    """Stands in for the neck's position encodings: a zero of each level's shape that takes no memory."""

    def forward(self, shape: Any, device: Any, dtype: torch.dtype, mask: Any = None) -> Tensor:
        return torch.zeros(1, device=device, dtype=dtype).expand(shape)


def make_lean(sam: Any) -> None:
    """Let the image encoder of ``sam``, a ``Sam2Model``, skip what this package never reads."""
    encoder = sam.vision_encoder
    for module in encoder.modules():
        if type(module) is Sam2MultiScaleAttention and module.config._attn_implementation == "sdpa":
            module.__class__ = LeanAttention
        elif type(module) is Sam2MultiScaleBlock:
            module.__class__ = BandedBlock
    encoder.neck.position_encoding = NoPositions()
