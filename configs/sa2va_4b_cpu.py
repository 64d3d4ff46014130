"""One step of the real size without GPU, weights or tokenizer files: what scripts/dry_run_4b.sh runs.

Random bf16 weights; the tokenizer comes from the folder given as ``--model_path``, which the script makes.
"""

_base_ = ["_base_/sa2va_4b.py"]

# The rows of new tokens stay in the frozen tables, as in a run from imported weights.
model = dict(train_embeddings="none")
data = dict(num_workers=0, regions_per_image=1)
loop = dict(max_new_tokens=16, on_rejected="fallback")
train = dict(
    device="cpu",
    batch_size=1,
    gradient_accumulation_steps=1,
    max_steps=1,
    log_interval=1,
    keep_checkpoints=1,
)
