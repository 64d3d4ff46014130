"""Configuration: an mmengine Python file and flags in, frozen dataclasses out.

mmengine's ``Config`` keeps misspelt keys without a word, so everything it reads passes through the dataclasses
below. All problems are reported at once, each with the nearest valid key.
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

GATES = ("special_token", "prompt_leak", "coordinates", "script", "repetition", "truncated", "empty")
"""What makes a caption earn nothing; see ``loop.gates``."""

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, precision, adapters and freeze policy.

    Attributes:
        name: shown in tables and reports.
        tokenizer: ``"tiny"`` (the byte-level tokenizer in the package) or a folder with tokenizer files;
            None takes the folder given as ``--model_path``.
        vision: keyword arguments of transformers' ``InternVLVisionConfig``.
        text: keyword arguments of transformers' ``Qwen2Config``.
        downsample_ratio: pixel-shuffle factor between patches and image tokens (0.5 in InternVL).
        sam2: ``{"image_size", "fpn_hidden_size", "backbone": {...}, "mask_decoder": {...}}``, see ``model.build``.
        text_hidden_dim: inner width of ``text_hidden_fcs``; None is the language model's width.
        template: chat template, a key of ``model.prompts.TEMPLATES``.
        single_mask: use mask candidate 0 instead of the arg-max over three candidates.
        dtype: ``"float32"``, ``"bfloat16"``: the dtype of the frozen weights.
        attn_implementation: ``"sdpa"`` or ``"eager"`` for the vision-language part.
        trainable: parameter groups that train, from ``model.adapters.GROUPS``.
        train_embeddings: ``auto | none | new_tokens | all``; auto is none with imported weights, else new_tokens.
        lora_r, lora_alpha, lora_dropout: LoRA on every linear layer of the language model but the head.
        gradient_checkpointing: recompute activations in the language model and a trainable vision tower.
        initial_weights: weights to start from when ``--pretrained_pth`` is not given; ``"tiny"`` is the checkpoint in
            the package, None is random.
    """

    name: str = "sa2va_4b"
    tokenizer: str | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    downsample_ratio: float = 0.5
    sam2: Mapping[str, Any] = field(default_factory=dict)
    text_hidden_dim: int | None = None
    template: str = "phi3_chat"
    single_mask: bool = False
    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    trainable: tuple[str, ...] = ("lora", "mlp1", "mask_decoder", "text_hidden_fcs")
    train_embeddings: str = "auto"
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = True
    initial_weights: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how samples are chosen. A directory of None leaves the source out."""

    sav_dir: str | None = None
    sav_max_samples: int | None = None
    sav_repeats: float = 1.0
    sav_weight: float | None = None
    sa1b_dir: str | None = None
    sa1b_max_samples: int | None = None
    sa1b_repeats: float = 1.0
    sa1b_weight: float | None = None
    sa1b_min_area: float = 0.001
    sa1b_max_area: float = 0.95
    sa1b_min_predicted_iou: float = 0.0
    sa1b_min_stability_score: float = 0.0
    openimage_dir: str | None = None
    openimage_max_samples: int | None = None
    openimage_repeats: float = 1.0
    openimage_weight: float | None = None
    openimage_csv: str | None = None
    openimage_classes: str | None = None
    openimage_images: str | None = None
    openimage_masks: str | None = None
    refcoco_dir: str | None = None
    refcoco_repeats: float = 1.0
    refcoco_weight: float | None = None
    refcoco_max_samples: int | None = None
    refcoco_datasets: tuple[str, ...] = ("refcoco", "refcoco+", "refcocog")
    refcoco_split: str = "train"
    refcoco_images: str | None = None
    regions_per_image: int = 1
    max_tiles: int = 1
    grid_pooling: str = "area"
    max_bad_fraction: float = 0.1
    max_bad_grace: int = 50
    index_dir: str | None = None
    num_workers: int = 2
    eval_dir: str | None = None
    eval_split: str = "val"
    eval_datasets: tuple[str, ...] = ("refcoco",)
    eval_max_samples: int | None = None


@dataclass(frozen=True)
class LoopConfig:
    """Step 1 (captioning) and step 2 (the question that the caption goes into).

    ``caption_question``, ``segment_question`` and ``segment_answer`` are names of the banks in ``model.prompts``;
    ``any`` draws one for each region.

    Attributes:
        segment_form: ``branches`` asks for every region in a branch of its own, ``turns`` for all regions of an image
            in the turns of one conversation with several [SEG], as Sa2VA trains.
        cycle_keep, cycle_drop: with ``cycle_keep``, a generated caption teaches step 2 with weight 1 from this cycle
            IoU on, 0 up to ``cycle_drop``, and linearly between; None keeps every caption.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    rollout_batch_size: int = 32
    caption_question: str = "short"
    segment_question: str = "segment"
    segment_answer: str = "sure"
    on_rejected: str = "fallback"
    fallback_caption: str = "the object"
    max_rejected_fraction: float = 0.5
    max_rejected_grace: int = 50
    caption_supervision: bool = True
    segment_form: str = "branches"
    cycle_keep: float | None = None
    cycle_drop: float = 0.5


@dataclass(frozen=True)
class PolicyConfig:
    """How the captioner learns what its captions were worth (``loop.estimators``).

    Attributes:
        caption_gradient: ``auto | none | scst | grpo | gumbel | gumbel+scst | gumbel+grpo``; auto is scst where a
            caption, contrast or length reward is on, else none.
        captions_per_region: K, sampled captions of a region (scst, grpo).
        temperature: of the sampled captions; log-probabilities are taken at the same temperature.
        weight: of the policy loss.
        advantage_scale: ``group`` divides a group's advantages by its deviation (GRPO as published), ``none`` does not.
        mask_truncated: leave captions that hit ``loop.max_new_tokens`` out of groups and loss.
        kl_weight: weight of the divergence from the reference; it is logged whatever the weight.
        gumbel_temperature, gumbel_temperature_end: of the straight-through softmax, at the first and the last step.
        gumbel_top_k: tokens of a position that gradient reaches, besides the sampled one.
    """

    caption_gradient: str = "auto"
    captions_per_region: int = 4
    temperature: float = 1.0
    weight: float = 1.0
    advantage_scale: str = "none"
    mask_truncated: bool = True
    kl_weight: float = 0.0
    gumbel_temperature: float = 1.0
    gumbel_temperature_end: float = 0.5
    gumbel_top_k: int = 64


@dataclass(frozen=True)
class RewardConfig:
    """What a caption earns (``loop.rewards``), and what makes it earn nothing (``loop.gates``).

    Attributes:
        cycle_weight: IoU of mask' and mask.
        contrast_weight: IoU with the own mask minus the best IoU with another region's mask of the same image.
        caption_weight: ``combined_caption_reward`` against reference captions, where there are any.
        length_weight: 1 for ``min_words..max_words`` words, falling linearly outside.
        listener: whose masks earn the cycle and contrast rewards and weigh the cycle filter: ``own`` (the live model),
            ``average`` (the weight average) or ``frozen`` (the weights that training started from). What is rewarded by
            the frozen listener is no longer judged by a stranger when the audit asks it.
        gates: names of the gates that are on, from :data:`GATES`; empty switches all off but
            special_token and empty, which step 2 could not read.
        judge_url: base address of an OpenAI-compatible server (``http://127.0.0.1:8000/v1``), None for no judge.
        judge_key_variable: name of the environment variable that holds its key, if it needs one.
        judge_timeout: seconds for one answer. judge_deadline: seconds for all answers of one optimiser step.
        judge_failure: ``skip`` counts an answer that failed and uses the other part alone; ``error`` stops the run.
    """

    cycle_weight: float = 1.0
    contrast_weight: float = 0.0
    caption_weight: float = 0.0
    length_weight: float = 0.0
    min_words: int = 2
    max_words: int = 32
    listener: str = "own"
    gates: tuple[str, ...] = GATES
    judge_url: str | None = None
    judge_model: str = "judge"
    judge_key_variable: str | None = None
    judge_timeout: float = 20.0
    judge_deadline: float = 60.0
    judge_retries: int = 2
    judge_workers: int = 8
    judge_failure: str = "skip"


@dataclass(frozen=True)
class LossConfig:
    """Weights and point sampling of step 3 (Sa2VA: mask 2.0, dice 0.5, language 1.0, 12,544 points).

    Attributes:
        num_objects: bring each image to exactly so many objects in the mask losses, fewer repeated cyclically, more
            drawn by a permutation (Sa2VA: 5); None counts every object once. See ``model.object_count``.
        distill_weight: weight of the distillation from the weight average (``loop.teacher``); 0 is off.
        distill_agreement: the teacher teaches an object where its mask has at least this IoU with the true mask.
        distill_confidence: pixels count where the teacher's |2p - 1| is at least this much.
        align_weight: weight of drawing the [SEG] embedding to SAM 2's own prompt embedding of the mask; 0 is off.
        align_through: ``all`` lets that loss reach everything that trains, ``projection`` only ``text_hidden_fcs``.
    """

    mask_weight: float = 2.0
    dice_weight: float = 0.5
    language_weight: float = 1.0
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    num_objects: int | None = None
    distill_weight: float = 0.0
    distill_agreement: float = 0.5
    distill_confidence: float = 0.5
    align_weight: float = 0.0
    align_through: str = "all"


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser step, its schedule, and what a run writes."""

    output_dir: str = "outputs/run"
    pretrained_pth: str | None = None
    model_path: str | None = None
    sam2_path: str | None = None
    allow_missing: tuple[str, ...] = ()
    num_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 2
    gradient_accumulation_steps: int = 4
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "auto"
    device: str = "auto"
    num_threads: int | None = None
    seed: int = 42
    resume: str | None = None
    log_interval: int = 10
    save_interval: int = 500
    keep_checkpoints: int = 2
    panel_interval: int = 200
    panels_per_save: int = 4
    audit_interval: int = 50
    eval_weights: str = "ema"


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; written to ``config.json`` in the run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
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
    "loop.on_rejected": ("fallback", "drop", "error"),
    "loop.segment_form": ("branches", "turns"),
    "policy.caption_gradient": ("auto", "none", "scst", "grpo", "gumbel", "gumbel+scst", "gumbel+grpo"),
    "policy.advantage_scale": ("none", "group"),
    "reward.listener": ("own", "average", "frozen"),
    "reward.judge_failure": ("skip", "error"),
    "loss.align_through": ("all", "projection"),
    "train.mixed_precision": ("auto", "no", "bf16"),
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
    "data.sa1b_repeats": 0,
    "data.openimage_repeats": 0,
    "data.refcoco_repeats": 0,
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
    "train.num_epochs": 1,
    "train.max_steps": 1,
    "train.batch_size": 1,
    "train.gradient_accumulation_steps": 1,
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
    if hint is str and isinstance(raw, (str, Path)):
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
