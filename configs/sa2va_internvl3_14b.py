"""Sa2VA-InternVL3-14B (Qwen2.5-14B), LoRA 256/512, 16.5 billion parameters; batch 1, accumulation 8."""

_base_ = ["_base_/sa2va_4b.py"]

model = dict(
    name="sa2va_internvl3_14b",
    text=dict(
        hidden_size=5120,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        intermediate_size=13824,
    ),
    template="qwen_chat",
    lora_r=256,
    lora_alpha=512,
)
train = dict(batch_size=1, gradient_accumulation_steps=8)
data = dict(regions_per_image=4, leakage_guard="drop")
