"""The full run: 8 GPUs x batch 2 x accumulation 4 = 64, all four data sets."""

_base_ = ["_base_/sa2va_4b.py"]

train = dict(batch_size=2, gradient_accumulation_steps=4, save_interval=500, log_interval=10)
data = dict(regions_per_image=4, leakage_guard="drop")
