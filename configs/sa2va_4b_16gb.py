"""GPUs of 16 GB: batch 1, two regions of an image, accumulation 8; 8-bit moments (extra quantize).

Cards without bf16 (T4) take fp16: ``--cfg-options model.dtype=float16``.
"""

_base_ = ["sa2va_4b_full.py"]

data = dict(regions_per_image=2)
train = dict(batch_size=1, gradient_accumulation_steps=8, optimizer="adamw8bit")
# For --dry_run and the choice of recomputed layers: the smallest cards sold with this name, less their context.
speed = dict(memory_gib=14)
