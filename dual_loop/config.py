"""Configuration: an mmengine Python file and flags in, frozen dataclasses out.

mmengine's ``Config`` keeps misspelt keys without a word, so everything it reads passes through the dataclasses
of ``dual_loop.settings``. All problems are reported at once, each with the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_loop.errors import ConfigError, explain
from dual_loop.settings import (
    GATES,
    DataConfig,
    LoopConfig,
    LossConfig,
    ModelConfig,
    PolicyConfig,
    RewardConfig,
    SpeedConfig,
    TrainConfig,
)

__all__ = [
    "GATES",
    "Config",
    "DataConfig",
    "LoopConfig",
    "LossConfig",
    "ModelConfig",
    "PolicyConfig",
    "RewardConfig",
    "SpeedConfig",
    "TrainConfig",
    "caption_gradient",
    "load_config",
    "resolve_config_path",
]

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; written to ``config.json`` in the run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as JSON holds them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def caption_gradient(policy: PolicyConfig, reward: RewardConfig) -> str:
    """Return the estimator's name with ``auto`` resolved: a reward that nobody learns from would be silent."""
    if policy.caption_gradient != "auto":
        return policy.caption_gradient
    has_reward = max(reward.contrast_weight, reward.caption_weight, reward.length_weight) > 0
    return "scst" if has_reward else "none"


CHOICES: Mapping[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.attn_implementation": ("sdpa", "eager"),
    "model.train_embeddings": ("auto", "none", "new_tokens", "all"),
    "data.grid_pooling": ("area", "nearest"),
    "data.decode_scale": ("full", "needed"),
    "data.sav_format": ("auto", "pairs", "videos"),
    "data.sav_masklets": ("both", "manual", "auto"),
    "data.leakage_guard": ("warn", "drop", "error", "off"),
    "loop.on_rejected": ("fallback", "drop", "error"),
    "loop.segment_form": ("branches", "turns"),
    "policy.caption_gradient": ("auto", "none", "scst", "grpo", "gumbel", "gumbel+scst", "gumbel+grpo"),
    "policy.advantage_scale": ("none", "group"),
    "reward.listener": ("own", "average", "frozen"),
    "reward.judge_failure": ("skip", "error"),
    "loss.align_through": ("all", "projection"),
    "speed.pack_weights": ("auto", "on", "off"),
    "speed.sdpa_kernel": ("auto", "flash", "efficient", "cudnn", "math"),
    "train.mixed_precision": ("auto", "no", "bf16"),
    "train.parallel": ("ddp", "fsdp"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.eval_weights": ("ema", "live"),
}

MINIMA: Mapping[str, float] = {
    "model.lora_r": 1,
    "data.regions_per_image": 1,
    "data.max_tiles": 1,
    "data.num_workers": 0,
    "data.max_bad_fraction": 0,
    "data.sav_repeats": 0,
    "data.sav_min_seconds": 0,
    "data.sav_max_seconds": 0,
    "data.sav_min_area": 0,
    "data.sa1b_repeats": 0,
    "data.openimage_repeats": 0,
    "data.refcoco_repeats": 0,
    "data.masks_repeats": 0,
    "data.masks_min_area": 0,
    "loop.max_new_tokens": 1,
    "loop.temperature": 0,
    "loop.rollout_batch_size": 1,
    "policy.captions_per_region": 1,
    "policy.temperature": 0.01,
    "policy.kl_weight": 0,
    "policy.gumbel_temperature": 0.01,
    "policy.gumbel_temperature_end": 0.01,
    "policy.gumbel_top_k": 1,
    "reward.min_words": 1,
    "reward.max_words": 1,
    "reward.judge_timeout": 0.1,
    "reward.judge_deadline": 0.1,
    "reward.judge_retries": 0,
    "reward.judge_workers": 1,
    "loss.distill_weight": 0,
    "loss.align_weight": 0,
    "loss.num_points": 0,
    "loss.num_objects": 1,
    "speed.cross_entropy_chunk": 0,
    "speed.feature_cache_gib": 0,
    "speed.memory_gib": 0.1,
    "train.num_epochs": 1,
    "train.max_steps": 1,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.effective_batch": 1,
    "train.learning_rate": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 0,
    "train.log_interval": 1,
    "train.save_interval": 1,
    "train.keep_checkpoints": 1,
    "train.audit_interval": 1,
}

FRACTIONS = (
    *("data.max_bad_fraction", "loop.max_rejected_fraction", "loop.cycle_keep", "loop.cycle_drop"),
    *("loss.distill_agreement", "loss.distill_confidence", "train.ema_decay"),
)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, apply ``overrides`` (``{"train.seed": 1}``) and return the typed configuration.

    Args:
        path: an mmengine Python config, or the ``config.json`` of a run; None takes the defaults.
        overrides: dotted keys to values; they win over the file.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; the message lists every problem.
    """
    tree = _read_tree(Path(path)) if path is not None else {}
    for key, value in (overrides or {}).items():
        _set_dotted(tree, key, value)
    problems: list[str] = []
    config = _build(Config, tree, "", problems)
    if not problems:
        _check_values(config, problems)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        origin = path or "(defaults and flags)"
        raise ConfigError(f"{len(problems)} problem(s) in the configuration {origin}:\n{listing}")
    return typing.cast(Config, config)


def resolve_config_path(name: str) -> Path:
    """Return the config file called ``name``: a path as given, or a name under the package's ``configs/``."""
    candidates = [Path(name), CONFIG_DIR / name, CONFIG_DIR / f"{name}.py", CONFIG_DIR.parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in CONFIG_DIR.glob("*.py"))
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    raise ConfigError(
        explain(
            "config file not found",
            where=name,
            expected=f"one of {', '.join(known)} or a path",
            fix=f"did you mean {close[0]}?" if close else "check the path given to --config",
        )
    )


def _read_tree(path: Path) -> dict[str, Any]:
    from mmengine.config import Config as MMConfig

    try:
        tree = MMConfig.fromfile(str(path), import_custom_modules=False).to_dict()
    except Exception as error:  # mmengine raises many types, from SyntaxError to its own
        raise ConfigError(
            explain("config file cannot be read", str(path), f"{type(error).__name__}: {error}", fix="mend the file")
        ) from error
    return typing.cast(dict[str, Any], tree)


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(explain("override goes below a value", dotted, child, expected="a group of settings"))
        node = child
    node[leaf] = value


def _build(cls: type[Any], tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make dataclass ``cls`` from ``tree``; collect every problem instead of stopping at the first."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, raw in tree.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(key, list(hints), n=1)
            problems.append(f"unknown key {dotted!r}" + (f"; did you mean {prefix}{close[0]!s}?" if close else ""))
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(raw, Mapping):
                values[key] = _build(typing.cast(type[Any], hints[key]), raw, f"{dotted}.", problems)
            else:
                problems.append(f"{dotted}: seen {raw!r}, expected a group of settings")
        else:
            try:
                values[key] = _coerce(raw, hints[key])
            except (TypeError, ValueError):
                problems.append(f"{dotted}: seen {raw!r}, expected {_type_name(hints[key])}")
    return cls(**values)


def _coerce(raw: Any, hint: Any) -> Any:
    """Convert ``raw`` to type ``hint`` where nothing is lost; raise TypeError or ValueError otherwise."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if raw is None or (isinstance(raw, str) and raw.lower() == "none"):
            return None
        return _coerce(raw, next(a for a in typing.get_args(hint) if a is not type(None)))
    if origin is tuple:
        items = raw.split(",") if isinstance(raw, str) else list(raw)
        args = typing.get_args(hint)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(raw)
        return tuple(_coerce(item.strip() if isinstance(item, str) else item, args[0]) for item in items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, Mapping):
            raise TypeError(raw)
        return dict(raw)
    if hint is bool:
        return _to_bool(raw)
    if hint is int:
        if isinstance(raw, bool) or int(raw) != float(raw):
            raise TypeError(raw)
        return int(raw)
    if hint is float:
        if isinstance(raw, bool):
            raise TypeError(raw)
        return float(raw)
    if hint is str and isinstance(raw, (str, Path, int)) and not isinstance(raw, bool):
        return str(raw)
    raise TypeError(raw)


def _to_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in ("true", "1", "yes", "false", "0", "no"):
        return raw.lower() in ("true", "1", "yes")
    raise TypeError(raw)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _get_dotted(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def _check_values(config: Any, problems: list[str]) -> None:
    for dotted, allowed in CHOICES.items():
        value = _get_dotted(config, dotted)
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"{dotted}: seen {value!r}, expected one of {', '.join(allowed)}{hint}")
    for dotted, minimum in MINIMA.items():
        value = _get_dotted(config, dotted)
        if value is not None and value < minimum:
            problems.append(f"{dotted}: seen {value}, expected at least {minimum:g}")
    for dotted in FRACTIONS:
        if not 0 <= (_get_dotted(config, dotted) or 0.0) <= 1:
            problems.append(f"{dotted}: seen {_get_dotted(config, dotted)}, expected a fraction between 0 and 1")
    layers = config.speed.checkpoint_layers
    if layers not in ("auto", "all", "none") and not layers.isdigit():
        problems.append(f"speed.checkpoint_layers: seen {layers!r}, expected auto, all, none or a number of layers")
    images = config.speed.images_at_once
    if images not in ("auto", "all") and not (images.isdigit() and int(images) > 0):
        problems.append(f"speed.images_at_once: seen {images!r}, expected auto, all or a number from 1 on")
    unknown = [name for name in config.reward.gates if name not in GATES]
    if unknown:
        problems.append(f"reward.gates: seen {', '.join(unknown)}, expected some of {', '.join(GATES)}")
    if config.loop.cycle_keep is not None and config.loop.cycle_keep <= config.loop.cycle_drop:
        seen = f"{config.loop.cycle_keep} and {config.loop.cycle_drop}"
        problems.append(f"loop.cycle_keep and loop.cycle_drop: seen {seen}, expected keep above drop")
    rewards = [name for name in ("contrast", "caption", "length") if _get_dotted(config, f"reward.{name}_weight") > 0]
    if rewards and config.policy.caption_gradient in ("none", "gumbel"):
        where = ", ".join(f"reward.{name}_weight" for name in rewards)
        expected = "policy.caption_gradient auto, scst, grpo or gumbel+.."
        problems.append(f"{where}: nobody learns from it with {config.policy.caption_gradient}; expected {expected}")
    if config.policy.caption_gradient.endswith("grpo") and config.policy.captions_per_region < 2:
        problems.append("policy.captions_per_region: seen 1, expected at least 2 with grpo: a group of one has no rest")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
