"""Sa2VA-1B: InternVL2.5-1B (Qwen2.5-0.5B), 1.23 billion parameters; batch 1, accumulation 8."""

_base_ = ["_base_/sa2va_4b.py"]

model = dict(
    name="sa2va_1b",
    text=dict(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
    ),
)
train = dict(batch_size=1, gradient_accumulation_steps=8)
data = dict(regions_per_image=4, leakage_guard="drop")
