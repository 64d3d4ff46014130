"""GPUs of 12 GB: batch 1, two regions of an image, accumulation 8; NF4 matrices and 8-bit moments (extra quantize)."""

_base_ = ["sa2va_4b_full.py"]

model = dict(quantize="nf4")
data = dict(regions_per_image=2)
train = dict(batch_size=1, gradient_accumulation_steps=8, optimizer="adamw8bit")
# For --dry_run and the choice of recomputed layers: the smallest cards sold with this name, less their context.
speed = dict(memory_gib=10.6)
