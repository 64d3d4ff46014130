"""The smoke run: 4 GPUs, batch 1, SA-1B capped at 500 image files, one epoch."""

_base_ = ["_base_/sa2va_4b.py"]

train = dict(batch_size=1, gradient_accumulation_steps=4, save_interval=100, log_interval=1)
data = dict(sa1b_max_samples=500)
