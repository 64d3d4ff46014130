"""dual_loop: train a grounded multimodal model from masks alone.

Importing the package is cheap on purpose: neither torch nor transformers is imported until a name below is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "VideoLLaVASAMModel": "dual_loop.model.sa2va_api",
    "build_model": "dual_loop.model.build",
    "load_config": "dual_loop.config",
    "pool_mask_to_grid": "dual_loop.data.masks",
    "build_dataset": "dual_loop.data.dataset_builder",
    "generate_caption_from_mask": "dual_loop.loop.captioner",
    "guess_load_checkpoint": "dual_loop.checkpoint.importer",
    "load_weights": "dual_loop.checkpoint.importer",
    "compute_segmentation_loss": "dual_loop.loop.segmentation_loss",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dual_loop' has no attribute {name!r}")
