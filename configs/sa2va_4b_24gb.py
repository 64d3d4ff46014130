"""GPUs of 24 GB: batch 1, four regions of an image, accumulation 8 (64 on 8 GPUs)."""

_base_ = ["sa2va_4b_full.py"]

train = dict(batch_size=1, gradient_accumulation_steps=8)
# For --dry_run and the choice of recomputed layers: the smallest cards sold with this name, less their context.
speed = dict(memory_gib=21)
