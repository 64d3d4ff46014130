"""Sa2VA-InternVL3-2B (Qwen2.5-1.5B), 2.46 billion parameters; batch 1, accumulation 8."""

_base_ = ["_base_/sa2va_4b.py"]

model = dict(
    name="sa2va_internvl3_2b",
    text=dict(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
    ),
    template="qwen_chat",
)
train = dict(batch_size=1, gradient_accumulation_steps=8)
data = dict(regions_per_image=4, leakage_guard="drop")
