"""The embedded default of test_dual_loop.sh: the tiny model on generated data, minutes on two CPU cores."""

_base_ = ["tiny_cpu.py"]

train = dict(
    batch_size=8,
    gradient_accumulation_steps=1,
    num_epochs=1,
    learning_rate=8e-4,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    ema_decay=0.99,
    log_interval=10,
    save_interval=200,
    panel_interval=200,
)
data = dict(
    regions_per_image=4,
    num_workers=0,
    # A quarter of each: the captioned part stays in the mix and anchors [SEG] and the language.
    sav_weight=0.25,
    sa1b_weight=0.25,
    openimage_weight=0.25,
    refcoco_weight=0.25,
    # One epoch of the generated data (1,900 entries) is 3,600 images: 450 steps of one process.
    sav_repeats=1.894,
    sa1b_repeats=1.894,
    openimage_repeats=1.894,
    refcoco_repeats=1.894,
    eval_datasets=("refcoco",),
    eval_split="val",
)
loop = dict(max_new_tokens=12)
