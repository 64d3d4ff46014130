"""GPUs of 80 GB: batch 4, eight regions of an image, accumulation 2 (64 on 8 GPUs)."""

_base_ = ["sa2va_4b_full.py"]

train = dict(batch_size=4, gradient_accumulation_steps=2)
data = dict(regions_per_image=8)
# For --dry_run and the choice of recomputed layers: the smallest cards sold with this name, less their context.
speed = dict(memory_gib=75)
