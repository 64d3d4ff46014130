"""A size between the tiny and the real one, for benchmarks on a CPU: 47 million parameters, random weights."""

model = dict(
    name="bench_mid",
    tokenizer="tiny",
    vision=dict(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        image_size=[448, 448],
        patch_size=[14, 14],
    ),
    text=dict(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    downsample_ratio=0.5,
    sam2=dict(
        image_size=512,
        fpn_hidden_size=256,
        backbone=dict(
            hidden_size=48,
            num_attention_heads=1,
            blocks_per_stage=[1, 2, 4, 1],
            window_size_per_stage=[8, 4, 16, 8],
            global_attention_blocks=[5],
        ),
    ),
    dtype="float32",
    lora_r=32,
    lora_alpha=64,
    lora_dropout=0.0,
    gradient_checkpointing=False,
)
train = dict(batch_size=2, gradient_accumulation_steps=4)
loop = dict(max_new_tokens=32)
