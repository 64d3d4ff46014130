"""Sa2VA-InternVL3-8B (Qwen2.5-7B), LoRA 256/512, 8.82 billion parameters; batch 1, accumulation 8."""

_base_ = ["_base_/sa2va_4b.py"]

model = dict(
    name="sa2va_internvl3_8b",
    text=dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
    ),
    template="qwen_chat",
    lora_r=256,
    lora_alpha=512,
)
train = dict(batch_size=1, gradient_accumulation_steps=8)
data = dict(regions_per_image=4, leakage_guard="drop")
