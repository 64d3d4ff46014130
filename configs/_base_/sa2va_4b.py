"""The real size: InternVL2.5-4B (InternViT-300M, Qwen2.5-3B), SAM 2 Hiera-L, LoRA 128/256."""

model = dict(
    name="sa2va_4b",
    vision=dict(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=[448, 448],
        patch_size=[14, 14],
    ),
    text=dict(
        # 151,674 tokens in the released vocabulary and the five of Sa2VA.
        vocab_size=151679,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=11008,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    downsample_ratio=0.5,
    sam2=dict(
        image_size=1024,
        fpn_hidden_size=256,
        backbone=dict(
            hidden_size=144,
            num_attention_heads=2,
            blocks_per_stage=[2, 6, 36, 4],
            window_size_per_stage=[8, 4, 16, 8],
            global_attention_blocks=[23, 33, 43],
        ),
    ),
    dtype="bfloat16",
    lora_r=128,
    lora_alpha=256,
)
# Room for a detailed caption; most end long before.
loop = dict(max_new_tokens=128)
