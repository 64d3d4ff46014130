"""Attention of the language model on a CPU.

Registered with transformers under :data:`GROUPED`; both cases end in torch's fused kernel. On a GPU the stock call does
this already.

* A single new token: query heads that share keys and values go through the kernel as so many queries of one head, so
  keys and values are neither repeated nor copied.
* bfloat16 on a CPU whose products are faster in float32 (``model.cpu_bfloat16``): computed in float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dual_loop.model import cpu_bfloat16

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
    if not is_decoding:
        return _widened_attention(module, query, key, value, attention_mask, **options), None
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, grouped.shape[2], -1)
    output = F.scaled_dot_product_attention(grouped, key, value, mask, scale=options.get("scaling"))
    return output.reshape(rows, 1, heads, width), None


def _widened_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Return the output of transformers' ``sdpa``, taken in float32 where this CPU is faster so."""
    kind, dtype = query.device.type, query.dtype
    if kind != "cpu" or dtype != torch.bfloat16 or not cpu_bfloat16.is_slower_than_float32():
        return torch.as_tensor(sdpa_attention_forward(module, query, key, value, mask, **options)[0])
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(kind, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return torch.as_tensor(output).to(dtype)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
