"""Attention while decoding on a CPU: all query heads that share keys and values in one matrix product.

Registered with transformers under :data:`GROUPED`; everything but a single new token goes to its ``sdpa``. On a GPU the
stock kernels do this already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "sdpa_grouped_decoding"


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in transformers' form.

    Args:
        query: (R, heads, n, d). key, value: (R, key-value heads, columns, d).
        attention_mask: (R, 1, n, columns) additive, or None.

    Returns:
        (R, n, heads, d), and no weights.
    """
    is_decoding = query.shape[2] == 1 and query.device.type == "cpu" and not torch.is_grad_enabled()
    if not is_decoding or (attention_mask is not None and attention_mask.dtype == torch.bool):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    scores = (grouped @ key.transpose(-1, -2)).float() * options.get("scaling", width**-0.5)
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    output = scores.softmax(-1).to(value.dtype) @ value
    return output.reshape(rows, 1, heads, width), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
