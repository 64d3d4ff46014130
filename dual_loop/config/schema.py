"""The settings of a run, each declared once: a field is the default, the explanation, the limits and the flag.

``config.load`` makes everything else from these fields: the reading of files and flags, the checks, ``--help``. A new
setting or flag is one field here. A setting that goes or gets another name leaves a line in ``config.retired``, so
that old files and runs are still read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from dual_loop.config.retired import REMOVED as REMOVED
from dual_loop.config.retired import RENAMED as RENAMED
from dual_loop.config.setting import MOST as MOST
from dual_loop.config.setting import SHARE, Setting, flag, setting
from dual_loop.config.train import TrainConfig
from dual_loop.config.words import (
    CAPTION_QUESTIONS,
    CAPTIONER,
    EVALUATION,
    GATES,
    GROUPS,
    HUB,
    SEGMENT_ANSWERS,
    SEGMENT_QUESTIONS,
    SEGMENTER,
    TEMPLATES,
    TRAINED,
    WEIGHTS,
)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, precision, adapters and freeze policy."""

    name: str = setting("sa2va_4b", "shown in tables and reports")
    tokenizer: str | None = setting(None, "tiny (in the package) or a folder; none: --model_path", f"DIR|{HUB}")
    vision: Mapping[str, Any] = setting({}, "keyword arguments of transformers' InternVLVisionConfig")
    text: Mapping[str, Any] = setting({}, "keyword arguments of transformers' Qwen2Config")
    downsample_ratio: float = setting(0.5, "of pixels, from patches to image tokens", at_least=0.01, at_most=1)
    sam2: Mapping[str, Any] = setting({}, "image_size, fpn_hidden_size, backbone, mask_decoder; see model.build")
    text_hidden_dim: int | None = setting(None, "width inside text_hidden_fcs; none: the language model's", at_least=1)
    template: str = setting("phi3_chat", "chat template", choices=TEMPLATES)
    single_mask: bool = setting(False, "use mask candidate 0 instead of the arg-max over three candidates")
    dtype: str = setting("bfloat16", "dtype of the frozen weights", choices=("float32", "bfloat16", "float16"))
    quantize: str = flag(
        "none",
        "nf4: the language model's frozen matrices in four bits, on GPUs (extra quantize)",
        choices=("none", "nf4"),
    )
    attn_implementation: str = setting("sdpa", "attention of the vision-language part", choices=("sdpa", "eager"))
    trainable: tuple[str, ...] = setting(TRAINED, "parameter groups that train; see model.adapters", choices=GROUPS)
    train_embeddings: str = flag(
        "auto",
        "token embeddings that train; auto: none with imported weights, else new_tokens",
        choices=("auto", "none", "new_tokens", "all"),
    )
    lora_r: int = flag(
        128, "rank of LoRA, on every linear layer of the language model but the head", "RANK", at_least=1, at_most=2**16
    )
    lora_alpha: int = flag(256, "LoRA is scaled by alpha / rank", at_least=1)
    use_rslora: bool = flag(False, "scale LoRA by alpha / the root of the rank (2312.03732)", "on|off")
    use_dora: bool = flag(False, "train a magnitude of each row of W + BA beside LoRA (2402.09353); slower", "on|off")
    lora_dropout: float = setting(0.05, "dropout before LoRA", "FRACTION", **SHARE)
    gradient_checkpointing: bool = setting(True, "recompute activations where speed.checkpoint_layers says so")
    initial_weights: str | None = setting(None, "without --pretrained_pth; tiny: those in the package, none: random")


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how samples are chosen. A directory of None leaves the source out."""

    sav_dir: str | None = flag(None, "SA-V: frame pairs (.npz) or videos (.mp4 with .json)", "DIR")
    sav_max_samples: int | None = flag(None, "use only so many frame pairs", "PAIRS", at_least=1)
    sav_repeats: float = flag(1.0, "times an epoch, fractions allowed", "TIMES", at_least=0)
    sav_weight: float | None = setting(None, "share of the mix; none: by size and repeats")
    sav_format: str = flag(
        "auto", "auto: frame pairs (.npz) where there are any, else videos", choices=("auto", "pairs", "videos")
    )
    sav_frames: int = flag(
        2,
        "of a clip: the first is captioned, one [SEG] segments all others; 2: a frame pair",
        "FRAMES",
        at_least=2,
        at_most=1024,
    )
    sav_masklets: str = setting("both", "masklets of the videos that are read", choices=("both", "manual", "auto"))
    sav_min_seconds: float = setting(
        0.5, "least time between the captioned frame of a video and the others", "SECONDS", at_least=0
    )
    sav_max_seconds: float = setting(
        2.0, "most time between the captioned frame of a video and the others", "SECONDS", at_least=0
    )
    sav_min_area: float = setting(
        0.001, "least part of the frame that a masklet covers", "FRACTION", at_least=0, at_most=1
    )
    sa1b_dir: str | None = flag(None, "SA-1B images with their JSON files", "DIR")
    sa1b_max_samples: int | None = flag(None, "use only so many image files", "IMAGES", at_least=1)
    sa1b_repeats: float = setting(1.0, "times an epoch, fractions allowed", "TIMES", at_least=0)
    sa1b_weight: float | None = setting(None, "share of the mix; none: by size and repeats")
    sa1b_min_area: float = setting(0.001, "least part of the image that a mask covers", "FRACTION", **SHARE)
    sa1b_max_area: float = setting(0.95, "most of the image that a mask covers", "FRACTION", **SHARE)
    sa1b_min_predicted_iou: float = setting(0.0, "least predicted_iou of a mask")
    sa1b_min_stability_score: float = setting(0.0, "least stability_score of a mask", **SHARE)
    openimage_dir: str | None = flag(None, "Open Images, root of the four paths below", "DIR")
    openimage_max_samples: int | None = flag(None, "use only so many images", "IMAGES", at_least=1)
    openimage_repeats: float = setting(1.0, "times an epoch, fractions allowed", "TIMES", at_least=0)
    openimage_weight: float | None = setting(None, "share of the mix; none: by size and repeats")
    openimage_csv: str | None = flag(None, "object segmentation table, if elsewhere", "FILE")
    openimage_classes: str | None = flag(None, "class descriptions, if elsewhere", "FILE")
    openimage_images: str | None = flag(None, "images, if elsewhere", "DIR")
    openimage_masks: str | None = flag(None, "masks, if elsewhere", "DIR")
    refcoco_dir: str | None = flag(None, "folder with refcoco, refcoco+, refcocog", "DIR")
    refcoco_repeats: float = flag(1.0, "times an epoch, fractions allowed", "TIMES", at_least=0)
    refcoco_weight: float | None = setting(None, "share of the mix; none: by size and repeats")
    refcoco_max_samples: int | None = flag(None, "use only so many images", "IMAGES", at_least=1)
    refcoco_datasets: tuple[str, ...] = setting(("refcoco", "refcoco+", "refcocog"), "which of them to train on")
    refcoco_split: str = flag("train", "split to train on", "NAME")
    refcoco_images: str | None = flag(None, "COCO images, if elsewhere", "DIR")
    masks_dir: str | None = flag(None, "your own masks: a folder, a COCO .json or a .jsonl file", "PATH")
    masks_max_samples: int | None = flag(None, "use only so many images", "IMAGES", at_least=1)
    masks_repeats: float = flag(1.0, "times an epoch, fractions allowed", "TIMES", at_least=0)
    masks_weight: float | None = setting(None, "share of the mix; none: by size and repeats")
    masks_images: str | None = flag(None, "images of your own masks, if elsewhere", "DIR")
    masks_min_area: float = setting(
        0.0, "least part of the image that a mask covers", "FRACTION", at_least=0, at_most=1
    )
    masks_max_area: float = setting(1.0, "most of the image that a mask covers", "FRACTION", **SHARE)
    masks_void: int | None = setting(255, "label of a map that is no object; none: it is one like others", "LABEL")
    masks_crowds: bool = setting(False, "take COCO's crowds (iscrowd) for objects")
    allow_absolute_paths: bool = flag(False, "open images of --masks_dir that are listed by absolute path", "on|off")
    leakage_guard: str = flag(
        "warn",
        "training images that are held out in the RefCOCO sets at hand: drop leaves them out, error stops, "
        "warn counts them, off does not look",
        choices=("warn", "drop", "error", "off"),
    )
    class_captions: str = flag(
        "off",
        "the class name of a region without caption is one (reference), or is what step 2 reads in place of a written "
        "caption that failed (fallback)",
        choices=("off", "reference", "fallback"),
    )
    exif: str = setting(
        "ignore",
        "photographs with an EXIF orientation whose masks fit either way: turned, or as stored",
        choices=("apply", "ignore"),
    )
    regions_per_image: int = flag(1, "most regions of an image in a step", "REGIONS", at_least=1, at_most=4096)
    region_choice: str = flag(
        "random",
        "regions of an image that are drawn together; hard: those most like the first (class, colour), but for SA-V",
        choices=("random", "hard"),
    )
    max_tiles: int = flag(
        1,
        "most tiles that an image is cut into, with a thumbnail of the whole on top (1: not cut; Sa2VA: 12); "
        "evaluate also takes auto, the protocol's",
        "TILES",
        at_least=1,
        at_most=1024,
    )
    target_pooling: str = setting(
        "area",
        "how a mask becomes a target: the covered part of each cell, or its corner as Sa2VA trains, half a cell off",
        choices=("area", "nearest"),
    )
    grid_pooling: str = setting("area", "how a mask becomes a grid of image tokens", choices=("area", "nearest"))
    decode_scale: str = setting(
        "full", "needed: a JPEG at 1/2, 1/4 or 1/8 where the model takes no more", choices=("full", "needed")
    )
    max_bad_fraction: float = setting(0.1, "stop where more entries than this cannot be read", "FRACTION", **SHARE)
    max_bad_grace: int = setting(50, "entries that are read before max_bad_fraction counts", "ENTRIES")
    max_pixels: int = setting(
        120_000_000, "largest image, mask or frame that is decoded or drawn", "PIXELS", at_least=1, at_most=2**28
    )
    max_file_mb: int = setting(
        2048, "largest file of annotations or references that is read whole", "MB", at_least=1, at_most=2**16
    )
    index_dir: str | None = setting(None, "folder of the data indexes; none: the user's cache", "DIR")
    num_workers: int = flag(
        2, "loader processes a rank; 0 loads in the main one", "PROCESSES", at_least=0, at_most=1024
    )
    eval_dir: str | None = flag(None, "held-out set (RefCOCO layout), before and after", "DIR", title=EVALUATION)
    eval_masks_dir: str | None = flag(None, "held-out masks of your own, before and after", "DIR", title=EVALUATION)
    val_fraction: float = flag(0.0, "images of --masks_dir that are held out instead", title=EVALUATION, at_most=0.9)
    eval_split: str = setting("val", "split of --eval_dir", "NAME")
    eval_datasets: tuple[str, ...] = setting(("refcoco",), "which of refcoco, refcoco+, refcocog are measured")
    eval_max_samples: int | None = flag(
        None, "use only so many held-out images", "IMAGES", title=EVALUATION, at_least=1
    )


@dataclass(frozen=True)
class LoopConfig:
    """Step 1 (captioning) and step 2 (the question that the caption goes into)."""

    max_new_tokens: int = flag(64, "longest caption", "TOKENS", at_least=1, at_most=2**16)
    temperature: float = setting(0.0, "of the captions that step 2 reads; 0 takes the likeliest token", at_least=0)
    top_p: float = setting(
        1.0,
        "sample from the likeliest tokens that together have this probability",
        "FRACTION",
        at_least=0.001,
        at_most=1,
    )
    rollout_batch_size: int | None = setting(
        None, "captions that are generated together; none: as many as 1/16 of the memory holds", "CAPTIONS", at_least=1
    )
    caption_question: str = setting("short", "see model.prompts; any: one drawn a region", choices=CAPTION_QUESTIONS)
    segment_question: str = setting("segment", "see model.prompts; any: one drawn a region", choices=SEGMENT_QUESTIONS)
    segment_answer: str = setting("sure", "see model.prompts; any: one drawn a region", choices=SEGMENT_ANSWERS)
    on_rejected: str = flag("fallback", "what to do where a caption fails", choices=("fallback", "drop", "error"))
    fallback_caption: str = setting("the object", "what step 2 reads in place of a caption that failed")
    max_rejected_fraction: float = setting(0.5, "stop where more captions than this fail", "FRACTION", **SHARE)
    max_rejected_grace: int = setting(50, "captions that are written before max_rejected_fraction counts", "CAPTIONS")
    caption_supervision: bool = flag(True, "step 1 learns to write reference captions where there are any", "on|off")
    segment_form: str = flag(
        "branches", "turns: the regions of an image in one conversation", title=SEGMENTER, choices=("branches", "turns")
    )
    cycle_keep: float | None = flag(
        None, "captions teach with full weight from this score on; none: all do", "SCORE", title=SEGMENTER, **SHARE
    )
    cycle_drop: float = flag(
        0.5, "captions up to this score teach nothing; linear between the two", "SCORE", title=SEGMENTER, **SHARE
    )
    cycle_score: str = flag(
        "iou",
        "what the two compare: cycle IoU, or a token's probability to the captioner and --reward_listener",
        title=SEGMENTER,
        choices=("iou", "likelihood"),
    )


@dataclass(frozen=True)
class PolicyConfig:
    """How the captioner learns what its captions were worth (``loop.signals.policy``, ``gumbel``)."""

    caption_gradient: str = flag(
        "auto",
        "estimator; auto: scst where a caption, contrast or length reward is on, else none",
        choices=("auto", "none", "scst", "grpo", "gumbel", "gumbel+scst", "gumbel+grpo"),
    )
    captions_per_region: int = flag(4, "sampled for each region (scst, grpo)", "CAPTIONS", at_least=1, at_most=1024)
    temperature: float = flag(1.0, "temperature of the sampled captions", "NUMBER", "policy_temperature", at_least=0.01)
    weight: float = flag(1.0, "weight of the policy loss", "NUMBER", "policy_weight")
    advantage_scale: str = setting(
        "none", "group divides a group's advantages by its deviation (GRPO as published)", choices=("none", "group")
    )
    mask_truncated: bool = setting(True, "leave captions that hit loop.max_new_tokens out of groups and loss")
    kl_weight: float = flag(0.0, "of the captioner's divergence from itself without the adapter", at_least=0)
    gumbel_temperature: float = setting(1.0, "of the straight-through softmax, at the first step", at_least=0.01)
    gumbel_temperature_end: float = setting(0.5, "of the straight-through softmax, at the last step", at_least=0.01)
    gumbel_top_k: int = setting(64, "tokens of a position with gradient, besides the sampled one", "TOKENS", at_least=1)


@dataclass(frozen=True)
class RewardConfig:
    """What a caption earns (``loop.rewards``), and what makes it earn nothing (``loop.gates``)."""

    cycle_weight: float | None = flag(
        None,
        "reward: IoU of mask' and mask; none: 1 where an estimator is named and no other reward is on, else 0",
        "NUMBER",
        "cycle_reward_weight",
    )
    contrast_weight: float = flag(
        0.0, "reward: IoU with the own mask minus the best with another region's", "NUMBER", "contrast_reward_weight"
    )
    caption_weight: float = flag(0.0, "reward: likeness to reference captions", "NUMBER", "caption_reward_weight")
    length_weight: float = flag(
        0.0, "reward: 1 for min_words..max_words words, linearly less outside", "NUMBER", "length_reward_weight"
    )
    min_words: int = setting(2, "shortest caption that earns the whole length reward", "WORDS", at_least=1)
    max_words: int = setting(32, "longest caption that earns the whole length reward", "WORDS", at_least=1)
    listener: str = flag(
        "own",
        "whose masks earn rewards and weigh the cycle filter: the live model's, the average's, those of the starting "
        "weights, or of a run or weights trained apart from the same start",
        f"own|average|frozen|PATH|{HUB}",
        name="reward_listener",
    )
    iou: str = flag(
        "hard",
        "of masks that earn rewards and weigh the cycle filter; soft: of their probabilities (fewer ties)",
        name="reward_iou",
        choices=("hard", "soft"),
    )
    gates: tuple[str, ...] = setting(GATES, "gates that are on; special_token and empty are always", choices=GATES)
    judge_url: str | None = flag(
        None, "OpenAI-compatible server that judges captions (http://127.0.0.1:8000/v1)", "URL"
    )
    judge_model: str = setting("judge", "its model", "NAME")
    judge_key_variable: str | None = setting(None, "environment variable that holds its key, if it needs one", "NAME")
    judge_timeout: float = setting(20.0, "for one answer", "SECONDS", at_least=0.1)
    judge_deadline: float = setting(60.0, "for all answers of an optimiser step", "SECONDS", at_least=0.1)
    judge_retries: int = setting(2, "further tries for an answer", "TIMES", at_least=0)
    judge_workers: int = setting(8, "questions that are asked at once", "NUMBER", at_least=1, at_most=1024)
    judge_failure: str = flag(
        "skip", "where the judge fails: skip uses the rest of the reward alone, error stops", choices=("skip", "error")
    )


@dataclass(frozen=True)
class LossConfig:
    """Weights and point sampling of step 3 (Sa2VA: mask 2.0, dice 0.5, language 1.0, 12,544 points)."""

    mask_weight: float = setting(2.0, "weight of the mask's cross-entropy")
    dice_weight: float = setting(0.5, "weight of the dice loss")
    language_weight: float = setting(1.0, "weight of the language model's cross-entropy")
    num_points: int = setting(12544, "points of a mask that the mask losses look at; 0: all", "POINTS", at_least=0)
    oversample_ratio: float = setting(
        3.0, "times as many points are drawn before the uncertain ones are kept", at_least=1
    )
    importance_sample_ratio: float = setting(
        0.75, "part of the points that is kept for being uncertain", "FRACTION", **SHARE
    )
    num_objects: int | None = setting(
        None,
        "bring each image to so many objects, repeated or drawn (Sa2VA: 5); none: each once",
        "OBJECTS",
        at_least=1,
    )
    distill_weight: float = flag(0.0, "distillation from the weight average", title=SEGMENTER, at_least=0)
    distill_form: str = flag(
        "kl",
        "soft_mask: distill_weight x (mask_weight x cross-entropy + dice_weight x dice) against the teacher's mask",
        title=SEGMENTER,
        choices=("kl", "soft_mask"),
    )
    distill_agreement: float | None = setting(
        None,
        "the teacher teaches an object where its mask has at least this IoU; none: 0.5 with kl, every object else",
        "IOU",
        **SHARE,
    )
    distill_confidence: float = setting(
        0.0, "pixels count where the teacher's |2p - 1| is at least this; 0: all", "NUMBER", **SHARE
    )
    no_target_weight: float = flag(
        0.0, "a data set's caption of another image is to give an empty mask", title=SEGMENTER, at_least=0
    )
    recaption_weight: float = flag(
        0.0, "a data set's caption again, for the mask that it led to as the region", title=CAPTIONER, at_least=0
    )
    align_weight: float = flag(0.0, "[SEG] embedding to SAM 2's own prompt of the mask", title=SEGMENTER, at_least=0)
    align_through: str = flag(
        "all", "projection: the alignment changes text_hidden_fcs alone", title=SEGMENTER, choices=("all", "projection")
    )
    points_from: str = setting(
        "full",
        "where the points read a mask: at its stored size, or in its target, as Sa2VA does",
        choices=("full", "grid"),
    )


@dataclass(frozen=True)
class SpeedConfig:
    """Levers that change what a step costs and nothing else; ``docs/performance.md`` says what each is worth.

    Everything that is on by default gives the same captions, losses and gradients as the plain flow up to rounding
    (``tests/invariants/test_levers.py``).
    """

    accelerate: bool = setting(True, "replace library layers by ones that compute the same faster; off: patch nothing")
    trim_last_layer: bool = setting(True, "leave unread positions out of the last decoder layer (Qwen2)")
    fused_lora: bool = setting(True, "run each adapter as two products that add into the frozen one's output")
    pack_weights: str = setting(
        "auto",
        "on a CPU, keep frozen matrices in the blocked layout of oneDNN; auto leaves float32 ones as they are "
        "on Intel's processors, whose stock products are as fast",
        choices=("auto", "on", "off"),
    )
    lean_sam2: bool = setting(True, "skip what transformers' SAM 2 encoder computes and nobody reads")
    start_on_disk: bool = setting(True, "keep the starting weights in a temporary file, unless they listen every step")
    feature_cache: str | None = setting(None, "folder of an on-disk cache of the frozen towers' features", "DIR")
    feature_cache_gib: float = setting(20.0, "most that the cache may hold", "GIB", at_least=0)
    checkpoint_layers: str = setting(
        "auto",
        "first decoder layers that are recomputed backwards (model.gradient_checkpointing); auto: as few as fit",
        "LAYERS",
        choices=("auto", "all", "none"),
        at_least=0,
    )
    images_at_once: str = setting(
        "auto",
        "images with a graph at a time; auto: one on a CPU with 256 or more image tokens, else all; fit: on a GPU as "
        "many as the memory holds, and no more than keep it busy",
        "IMAGES",
        choices=("auto", "all", "fit"),
        at_least=1,
    )
    memory_gib: float | None = setting(None, "for checkpoint_layers=auto; none: what is free", "GIB", at_least=0.1)
    liger: bool = setting(False, "Liger's Triton kernels for the language model and its loss (GPUs; extra liger)")
    sdpa_kernel: str = setting(
        "auto",
        "attention kernel and no other; auto: any but cuDNN's",
        choices=("auto", "flash", "efficient", "cudnn", "math"),
    )
    decode_graph: str = setting(
        "auto", "record a decoding step as a CUDA graph and play it, on GPUs", choices=("auto", "off")
    )
    tf32: bool = setting(False, "let GPUs multiply and convolve float32 in TF32, 10 bits of mantissa instead of 23")
    expandable_segments: bool = setting(
        True,
        "let the GPU's allocator grow its blocks, so that rows of changing length leave no holes (not over the "
        "user's own PYTORCH_CUDA_ALLOC_CONF)",
    )
    compile: bool = setting(False, "torch.compile for each decoder layer; the log counts the graphs it made")
    prefetch_to_device: bool = setting(False, "copy the next accumulation window to the GPU ahead of time")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; written to ``config.json`` in the run folder."""

    model: ModelConfig = field(default=ModelConfig(), metadata={"title": WEIGHTS})
    data: DataConfig = field(default=DataConfig(), metadata={"title": "data (a folder left out leaves the source out)"})
    loop: LoopConfig = field(default=LoopConfig(), metadata={"title": "loop"})
    policy: PolicyConfig = field(default=PolicyConfig(), metadata={"title": CAPTIONER})
    reward: RewardConfig = field(default=RewardConfig(), metadata={"title": CAPTIONER})
    loss: LossConfig = field(default=LossConfig(), metadata={"title": SEGMENTER})
    speed: SpeedConfig = field(default=SpeedConfig(), metadata={"title": "speed"})
    train: TrainConfig = field(default=TrainConfig(), metadata={"title": "training"})

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as JSON holds them."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))


SETTINGS: Mapping[str, Setting] = {
    f"{group.name}.{item.name}": replace(
        about,
        flag=item.name if about.flag == "=" else about.flag,
        title=about.title or group.metadata["title"],
        **about.limits(str(item.type)),
    )
    for group in fields(Config)
    for item in fields(getattr(Config(), group.name))
    for about in [item.metadata["setting"]]
}
"""Every setting by its dotted key, in the order of the fields."""
