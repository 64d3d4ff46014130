"""Settings that are gone or have another name today, so that old files and runs are still read."""

from __future__ import annotations

RENAMED: dict[str, str] = {}
"""Old dotted key, or old flag (``--old``), to the dotted key of today; read with a warning that names it."""

REMOVED: dict[str, str] = {
    "speed.share_towers": "the image encoders always run once an image",
    "speed.pack_branches": "turns about an image always share its row",
    "speed.batch_rollout": "the captions of a window are always written together",
    "speed.share_prefix": "an image's prefix is always read once",
    "speed.sort_by_length": "prompts of like length always share a generation",
    "speed.drop_finished": "finished rows always leave the generation",
    "speed.last_hidden_only": "only the last hidden state is kept",
    "speed.loss_positions_only": "logits are computed where a label is",
    "speed.cross_entropy_chunk": "1,024 positions at once (losses.LOGITS_AT_ONCE)",
    "speed.split_uneven_rows": "part of speed.accelerate",
    "speed.own_decoder": "transformers' generate serves the public adapter alone",
    "speed.lean_decoding": "part of speed.accelerate",
    "speed.grouped_attention": "it gained nothing (docs/experiments/cpu_step.md)",
    "speed.merge_adapters": "float32 adapters are always merged for step 1",
    "speed.keep_heap": "it gained nothing (docs/experiments/cpu_step.md)",
    "speed.fused_optimizer": "always on where nothing is sharded",
    "speed.bucket_view": "always on",
    "speed.static_cache": "there is one way to decode",
    "speed.compile_decode": "there is one way to decode",
}
"""Old dotted key, or old flag (``--old``), to the reason why it is gone; ignored with a warning."""
