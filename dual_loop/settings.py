"""The settings of a run as frozen dataclasses, one a group; ``dual_loop.config`` reads and checks them.

A new setting is a field here, with its default; a row in ``dual_loop.flags`` makes it a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GATES = ("special_token", "prompt_leak", "coordinates", "script", "repetition", "truncated", "empty")
"""What makes a caption earn nothing; see ``loop.gates``."""


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
        gradient_checkpointing: recompute activations in the language model (in as many layers as
            ``speed.checkpoint_layers`` says) and a trainable vision tower; False in none.
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
    """Where the data is and how samples are chosen. A directory of None leaves the source out.

    ``sav_format`` says what ``sav_dir`` holds: ``pairs`` (npz files), ``videos`` (as released), or ``auto``: pairs
    where there are any, else videos. The other ``sav_`` settings are those of ``data.sav_video.SavVideos``.

    ``leakage_guard`` decides what happens to training images whose COCO id is in a held-out split of the RefCOCO sets
    at hand (``refcoco_dir``, ``eval_dir``): ``drop`` leaves them out, ``error`` stops, ``warn`` counts them, ``off``
    does not look. See ``data.leakage``.

    ``decode_scale`` is for training: ``needed`` decodes a JPEG at a half, a quarter or an eighth of its sides where
    that is still no smaller than what the model takes; masks are the same, pixels differ as under another resampling
    filter. Evaluation, panels and predictions always decode in ``full``.
    """

    sav_dir: str | None = None
    sav_max_samples: int | None = None
    sav_repeats: float = 1.0
    sav_weight: float | None = None
    sav_format: str = "auto"
    sav_masklets: str = "both"
    sav_min_seconds: float = 0.5
    sav_max_seconds: float = 2.0
    sav_min_area: float = 0.001
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
    masks_dir: str | None = None
    masks_max_samples: int | None = None
    masks_repeats: float = 1.0
    masks_weight: float | None = None
    masks_images: str | None = None
    masks_min_area: float = 0.0
    masks_max_area: float = 1.0
    leakage_guard: str = "warn"
    regions_per_image: int = 1
    max_tiles: int = 1
    grid_pooling: str = "area"
    decode_scale: str = "full"
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
class SpeedConfig:
    """Levers that change what a step costs and nothing else; ``docs/performance.md`` says what each is worth.

    Everything that is on by default gives the same captions, losses and gradients as the plain flow up to rounding
    (``tests/invariants/test_levers.py``).

    Attributes:
        share_towers: run the frozen vision tower and SAM 2's encoder once an image, for both steps and all regions.
        pack_branches: let all branches about an image share its prefix in one row; off, every branch has its own row.
        batch_rollout: caption the whole accumulation window together; off, one caption at a time.
        share_prefix: compute keys and values of an image's prefix once for all its regions and samples in step 1.
        sort_by_length: put prompts of like length into one generation.
        drop_finished: let finished rows leave the generation.
        last_hidden_only: keep the language model's last hidden state alone.
        trim_last_layer: leave positions that nobody reads out of the last decoder layer, but for their keys and values
            (Qwen2 language models); takes effect with ``last_hidden_only``.
        split_uneven_rows: let rows of unlike length go through the language model in groups of like length, without
            padding to the longest of the micro-batch (not where the model is sharded).
        loss_positions_only: compute vocabulary logits only where a label is.
        cross_entropy_chunk: most positions whose vocabulary logits exist at once; 0 takes all together. With chunks,
            logits are computed again in the backward pass.
        fused_lora: run each adapter as two matrix products that add into the frozen one's output.
        grouped_attention: on a CPU, let the query heads of a group share their keys and values in the attention kernel
            while decoding, and take bfloat16 attention in float32 where the processor is faster so.
        pack_weights: on a CPU, keep frozen matrices in the blocked layout of oneDNN: ``auto|on|off``. ``auto`` leaves
            float32 ones as they are on Intel's processors, whose stock products are as fast.
        merge_adapters: add the adapters to float32 matrices for the length of step 1. (With bfloat16 the sum would be
            rounded, and captions would come from another model than the one that trains.)
        lean_sam2: skip what transformers' SAM 2 encoder computes and nobody reads.
        keep_heap: on a CPU with glibc, keep freed memory for the next tensor instead of giving it back each time.
        start_on_disk: keep the weights that training started from, which audits compare with, in a temporary file
            instead of in memory (1 GiB a process for the 4B model); not where they listen at every step.
        own_decoder: decode with this package's loop; off, with transformers' ``generate``.
        lean_decoding: in that loop, pass new tokens through the layers of a Qwen2 language model without what
            transformers does around each of them.
        accelerate: let ``dual_loop.accelerate`` replace layers of the libraries by ones that compute the same faster;
            off, the plain layers run and no library is patched.
        fused_optimizer: AdamW and the weight average as fused or foreach operations.
        bucket_view: let gradients be views of DDP's buckets.
        feature_cache: folder of an on-disk cache of the frozen towers' features; None for none.
        feature_cache_gib: most GiB that the cache may hold.
        static_cache: decode with transformers' static cache (needed by ``compile_decode``).
        compile_decode: compile the decoding step (GPUs).
        checkpoint_layers: decoder layers whose activations are computed again in the backward pass, the first ones:
            ``all``, ``none``, a number, or ``auto``, as few as the memory allows (``training.layer_memory``). Counts
            where ``model.gradient_checkpointing`` is on.
        images_at_once: images of a micro-batch that go through steps 2 and 3 together, each group with its own backward
            pass: ``all``, a number, or ``auto``, one on a CPU with 256 or more image tokens, else all
            (``training.window_parts``).
        memory_gib: GiB that one process may use in all, for ``checkpoint_layers = auto``; None takes what is free.
        liger: Liger's Triton kernels for the language model and its cross-entropy (GPUs; extra ``liger``).
        sdpa_kernel: the attention kernel of the training step, ``auto`` or one and no other:
            ``flash|efficient|cudnn|math``.
        prefetch_to_device: copy the next accumulation window to the GPU while the current one is computed.
    """

    share_towers: bool = True
    pack_branches: bool = True
    batch_rollout: bool = True
    share_prefix: bool = True
    sort_by_length: bool = True
    drop_finished: bool = True
    last_hidden_only: bool = True
    trim_last_layer: bool = True
    split_uneven_rows: bool = True
    loss_positions_only: bool = True
    cross_entropy_chunk: int = 1024
    fused_lora: bool = True
    grouped_attention: bool = True
    pack_weights: str = "auto"
    merge_adapters: bool = True
    lean_sam2: bool = True
    keep_heap: bool = True
    start_on_disk: bool = True
    own_decoder: bool = True
    lean_decoding: bool = True
    accelerate: bool = True
    fused_optimizer: bool = True
    bucket_view: bool = True
    feature_cache: str | None = None
    feature_cache_gib: float = 20.0
    static_cache: bool = False
    compile_decode: bool = False
    checkpoint_layers: str = "auto"
    images_at_once: str = "auto"
    memory_gib: float | None = None
    liger: bool = False
    sdpa_kernel: str = "auto"
    prefetch_to_device: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser step, its schedule, and what a run writes.

    ``effective_batch`` is the number of images of an optimiser step over all ranks; where it is given,
    ``gradient_accumulation_steps`` follows from it and from the number of ranks (``training.devices.share_out_batch``).
    ``parallel`` is ``ddp``, or ``fsdp``, which shards the language model over the ranks (``training.sharding``).
    ``allow_emulated_bf16`` lets a run in bf16 start on a device that has no bf16 of its own and is slow with it.
    """

    output_dir: str = "outputs/run"
    pretrained_pth: str | None = None
    model_path: str | None = None
    sam2_path: str | None = None
    allow_missing: tuple[str, ...] = ()
    num_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 2
    gradient_accumulation_steps: int = 4
    effective_batch: int | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "auto"
    parallel: str = "ddp"
    allow_emulated_bf16: bool = False
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
