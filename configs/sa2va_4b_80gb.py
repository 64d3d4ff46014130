"""GPUs of 80 GB: batch 4, eight regions of an image, accumulation 2 (64 on 8 GPUs), activations kept."""

_base_ = ["sa2va_4b_full.py"]

model = dict(gradient_checkpointing=False)
train = dict(batch_size=4, gradient_accumulation_steps=2)
data = dict(regions_per_image=8)
