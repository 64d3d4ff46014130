"""What several settings say together."""

from __future__ import annotations

from dual_loop.config.schema import Config, DataConfig, PolicyConfig, RewardConfig
from dual_loop.config.words import LISTENERS


def caption_gradient(policy: PolicyConfig, reward: RewardConfig) -> str:
    """Return the estimator's name with ``auto`` resolved: a reward that nobody learns from would be silent."""
    if policy.caption_gradient != "auto":
        return policy.caption_gradient
    has_reward = max(reward.contrast_weight, reward.caption_weight, reward.length_weight) > 0
    return "scst" if has_reward else "none"


def listener_paths(config: Config) -> tuple[str, ...]:
    """Return the paths of the listeners that were trained apart, each once."""
    paths = (config.train.audit_listener, config.reward.listener)
    return tuple(dict.fromkeys(path for path in paths if path and path not in LISTENERS))


def has_held_out(config: Config) -> bool:
    """Return whether there is anything to measure before, in and after training."""
    return bool(config.data.eval_dir) or has_held_out_masks(config.data)


def has_held_out_masks(data: DataConfig) -> bool:
    """Return whether own masks are held out: a folder of them, or a share of those that train."""
    return bool(data.eval_masks_dir or data.val_fraction)


def precision(config: Config) -> str:
    """Return accelerate's name of the precision; ``auto`` is that of the frozen weights."""
    if config.train.mixed_precision != "auto":
        return config.train.mixed_precision
    return {"bfloat16": "bf16", "float16": "fp16"}.get(config.model.dtype, "no")
