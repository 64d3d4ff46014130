"""The settings of the optimiser, of evaluations, and of what a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from dual_loop.config.setting import SHARE, flag, setting
from dual_loop.config.words import EVALUATION, FIGURES, HUB, RUN_FOLDER, TRACKERS, WEIGHTS


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser step, its schedule, and what a run writes."""

    output_dir: str = flag("outputs/run", "run folder", "DIR", title=RUN_FOLDER)
    pretrained_pth: str | None = flag(None, "weights to start from; none: the config's", f"PATH|{HUB}", title=WEIGHTS)
    model_path: str | None = flag(None, "base model: tokenizer, and weights if needed", f"DIR|{HUB}", title=WEIGHTS)
    sam2_path: str | None = flag(None, "SAM 2 weights under a checkpoint that lacks them", f"PATH|{HUB}", title=WEIGHTS)
    allow_missing: tuple[str, ...] = flag((), "names that may stay initial, comma-separated", "PATTERNS", title=WEIGHTS)
    num_epochs: int = flag(1, "passes over the data", "EPOCHS", at_least=1)
    max_steps: int | None = flag(None, "optimiser steps; wins over --num_epochs", "STEPS", at_least=1)
    batch_size: int = flag(2, "images of a micro-batch, a rank", "IMAGES", at_least=1)
    gradient_accumulation_steps: int = flag(4, "micro-batches a step", "BATCHES", at_least=1)
    effective_batch: int | None = flag(None, "of a step, all ranks; sets the accumulation", "IMAGES", at_least=1)
    learning_rate: float = flag(1e-5, "peak learning rate of AdamW", "RATE", at_least=0, at_most=1)
    optimizer: str = flag(
        "adamw",
        "adamw8bit: moments in eight bits, on GPUs (extra quantize)",
        choices=("adamw", "adamw8bit"),
    )
    lr_lora: float | None = flag(None, "peak of LoRA; none: --learning_rate", "RATE", at_least=0, at_most=1)
    lr_projector: float | None = flag(
        None, "peak of mlp1 and text_hidden_fcs; none: --learning_rate", "RATE", at_least=0, at_most=1
    )
    lr_decoder: float | None = flag(
        None, "peak of SAM 2's mask decoder; none: --learning_rate", "RATE", at_least=0, at_most=1
    )
    lr_schedule: str = flag(
        "cosine",
        "how rates fall behind the warm-up; wsd: only at the end, over train.decay_ratio",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    decay_ratio: float = setting(0.2, "of wsd: part of the steps, the last, over which rates fall", "FRACTION", **SHARE)
    weight_decay: float = flag(0.05, "of AdamW, on matrices only", at_least=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW, below 1", at_least=0, at_most=0.999999)
    warmup_ratio: float = setting(0.05, "part of the steps over which the learning rate rises", "FRACTION", **SHARE)
    min_lr_ratio: float = setting(0.0, "learning rate at the end, as a part of the peak", "FRACTION", **SHARE)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0 is off", "NORM", at_least=0)
    ema_decay: float = flag(0.999, "decay of the weight average, a step", "FRACTION", **SHARE)
    mixed_precision: str = flag(
        "auto", "auto: that of model.dtype; fp16 has a loss scale", choices=("auto", "no", "bf16", "fp16")
    )
    parallel: str = flag("ddp", "fsdp shards the language model over the ranks", choices=("ddp", "fsdp"))
    allow_emulated_bf16: bool = setting(False, "run in bf16 on a device that has none of its own and is slow with it")
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    rank_timeout: float = setting(
        600.0, "silence after which a rank is taken for hung, and longest wait in a collective", "SECONDS", at_least=5
    )
    num_threads: int | None = setting(
        None, "of torch, a process; none: torch's own choice", "THREADS", at_least=1, at_most=1024
    )
    seed: int = flag(42, "decides everything random", at_most=2**32 - 1)
    deterministic: bool = setting(
        False, "let a GPU repeat a run bit for bit, resumed or not, by slower kernels; a CPU does so anyway"
    )
    resume: str | None = flag(None, "newest whole checkpoint, or this one", "auto|DIR", title=RUN_FOLDER)
    log_interval: int = flag(10, "between two logged steps", "STEPS", title=RUN_FOLDER, at_least=1)
    report_to: tuple[str, ...] = flag(("tensorboard",), "who shows the records", title=RUN_FOLDER, choices=TRACKERS)
    save_interval: int = flag(500, "between two checkpoints", "STEPS", title=RUN_FOLDER, at_least=1)
    keep_checkpoints: int = flag(2, "newest checkpoints that are kept", title=RUN_FOLDER, at_least=1)
    panel_interval: int = flag(200, "between two sets of example panels", "STEPS", title=RUN_FOLDER, at_least=1)
    panels_per_save: int = setting(4, "panels of a set", "PANELS")
    audit_listener: str | None = flag(
        None,
        "a run or weights trained apart from the same start: also hear captions in audits",
        f"PATH|{HUB}",
        title=RUN_FOLDER,
    )
    audit_interval: int = flag(50, "between two audits (frozen listener, KL)", "STEPS", title=RUN_FOLDER, at_least=1)
    eval_weights: str = setting(
        "ema", "that are measured in and after training: averaged or last", choices=("ema", "live")
    )
    eval_strategy: str = flag(
        "ends",
        "evaluate before and after training alone, also every --eval_interval, also at the end of each epoch",
        title=EVALUATION,
        choices=("ends", "steps", "epoch"),
    )
    eval_interval: int | None = flag(
        None,
        "between two evaluations, which then take place; none: --save_interval",
        "STEPS",
        title=EVALUATION,
        at_least=1,
    )
    keep_best: str | None = flag(
        None,
        "figure by which checkpoints/best is the best of those that were evaluated",
        title=EVALUATION,
        choices=FIGURES,
    )
    patience: int | None = flag(
        None,
        "evaluations in a row that may be no better by --keep_best before a run ends",
        "EVALUATIONS",
        title=EVALUATION,
        at_least=1,
    )
    profile_steps: int = flag(
        0, "steps behind the first two that torch's profiler records, into profile/", "STEPS", title=RUN_FOLDER
    )
    max_time: float | None = flag(None, "after which a start saves and leaves", "MINUTES", title=RUN_FOLDER)
