"""The memory of one process: what a step takes, by part, and how many decoder layers recompute their activations.

One estimate serves ``--dry_run``, ``doctor``, ``speed.checkpoint_layers = auto`` and the planner of ``scripts/plan``.
The choice of layers::

    language(n) = n inputs + the larger of (layers - n) kept and, where n > 0, one kept
    wanted: the smallest n with  language(n) + the rest of a micro-batch  <=  SHARE_USED x free memory

What a layer and SAM 2's mask decoder keep is measured on tensors without contents (:func:`saved_bytes`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from dual_loop.config import Config, TrainConfig, caption_gradient, listener_paths, precision
from dual_loop.losses import LOGITS_AT_ONCE
from dual_loop.model import quantize
from dual_loop.model.build import geometry
from dual_loop.model.decode import CACHE_SHARE, head_width, row_bytes
from dual_loop.model.hardware import GPU_ROWS, autocast
from dual_loop.model.recompute import checkpoint_first, requested_layers
from dual_loop.model.sa2va import MASKS_AT_ONCE, GroundingDecoder
from dual_loop.training.devices import as_computed, gather_objects

GIB = 2**30
SHARE_USED = 0.85
"""Of the free memory: the rest is for fragments, workspaces, and rows longer than estimated."""
TEXT_TOKENS = 48
"""Of a question with its answer around a caption, roughly."""
BUSY_TOKENS = 4096
"""Of a micro-batch's rows, from which on a GPU's products gain little by more."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by part; rough, for choosing a batch size."""

    frozen: int
    trained: int  # float32; gradients and average take as much again
    moments: int  # of Adam
    buckets: int  # of DDP, on several ranks
    listeners: int  # trained parameters of those that were trained apart
    language: int  # what the decoder layers keep at their fullest moment
    layer_gradients: int  # of one of them
    mask_decoder: int
    logits: int  # five float32 copies of a chunk
    losses: int  # masks, targets and gradients
    features: int  # all images of the window, and what the frozen encoders made of them
    rollout: int  # prefixes and rows of one generation, or masks that are scored, whichever is more

    @property
    def state(self) -> int:
        """Bytes that are there whatever the batch is."""
        return self.frozen + 3 * self.trained + self.moments + self.buckets + self.listeners

    @property
    def training(self) -> int:
        """Bytes at the fullest moment of steps 2 and 3, besides state and features."""
        return self.language + self.layer_gradients + self.mask_decoder + self.logits + self.losses

    @property
    def micro_batch(self) -> int:
        """Bytes at the fullest moment of a step, besides the state."""
        return self.features + max(self.training, self.rollout)

    @property
    def total(self) -> int:
        return self.state + self.micro_batch

    def rows(self) -> dict[str, int]:
        """Return the parts of :attr:`total` by the names that are printed, without those that are 0."""
        rows = {
            "frozen parameters": self.frozen,
            "trained parameters (fp32)": self.trained,
            "gradients (fp32)": self.trained,
            "Adam moments": self.moments,
            "weight average (fp32)": self.trained,
            "DDP buckets (fp32)": self.buckets,
            "listeners (fp32)": self.listeners,
            "activations (language)": self.language,
            "activations (other)": self.training - self.language,
            "activations (features)": self.features,
            "activations (roll-out)": max(0, self.rollout - self.training),  # beyond those of steps 2 and 3
        }
        return {name: size for name, size in rows.items() if size}


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one decoder layer keeps of a micro-batch: all that its operations save, or its input alone.

    ``kept`` is without parameters and what all layers share. A recomputed layer keeps ``entry``.
    """

    kept: int
    entry: int


@dataclass(frozen=True)
class LayerPlan:
    """How many layers recompute their activations, and why."""

    recomputed: int  # the first so many
    layers: int
    chosen_by: str  # setting, memory, or default where memory should decide and is not known
    images: int  # with a graph at a time
    free_gib: float | None = None  # for a micro-batch; None where the setting decided
    needed_gib: float | None = None  # by a micro-batch with this choice; None where nothing was measured
    fits: bool = True  # False where all layers recomputed still need more than SHARE_USED of what is free

    def line(self) -> str:
        """Return one line for the start of a run."""
        text = f"Checkpointing: {self.recomputed} of {self.layers} decoder layers recomputed ({self.chosen_by}"
        if self.needed_gib is not None:
            text += f": about {self.needed_gib:.2f} GiB a micro-batch"
        if self.free_gib is not None:
            text += f", {self.free_gib:.2f} GiB free"
        return text + (")" if self.fits else "; this may not fit: lower --batch_size or --regions_per_image)")


class MemoryEstimator:
    """Estimates what a step of a model takes that was just built.

    Args:
        config: the whole configuration, with micro-batches as they are run.
        model: a ``VideoLLaVASAMModel``, neither packed nor sharded; may be on the meta device.
        world_size: ranks; decides only whether there are DDP buckets.
        is_choice: whether there are others for fewer images at a time.
    """

    def __init__(self, config: Config, model: Any, world_size: int = 1, is_choice: bool = False) -> None:
        self.config, self.model, self.world_size, self.is_choice = config, model, world_size, is_choice
        self.layers = len(model.mllm.model.language_model.layers)
        self.wanted = requested_layers(config, self.layers)
        if self.wanted is None or is_choice:
            self.estimate(0)  # measures now: when memory is known, matrices may be packed or sharded

    @cached_property
    def layer(self) -> LayerMemory:
        """What one decoder layer keeps of a long micro-batch."""
        return measure_layer(self.model, *shape_of_rows(self.config), precision(self.config))

    @cached_property
    def without_layers(self) -> MemoryEstimate:
        """The estimate with no byte for the decoder layers."""
        config, model = self.config, self.model
        train, sizes, regions = config.train, geometry(config), config.data.regions_per_image
        objects, window = train.batch_size * regions, train.batch_size * train.gradient_accumulation_steps
        frames, absent = target_frames(config), train.batch_size * (config.loss.no_target_weight > 0)
        tokens = objects * (TEXT_TOKENS + captions_with_graph(config) * config.loop.max_new_tokens)
        vocabulary = int(model.mllm.lm_head.out_features)
        level_values = sum(model.grounding.level_width(k) * (sizes.mask_size // 2**k) ** 2 for k in range(3))
        vision_width = model.mllm.model.multi_modal_projector.linear_1.in_features
        tile = 3 * sizes.vision_image_size**2 + sizes.grid_size**2 * vision_width
        frame = level_values + 3 * sizes.grounding_size**2
        views = frames + (config.data.sav_dir is not None)  # the captioned one beside those that are segmented
        scored = min(MASKS_AT_ONCE, objects * captions_written(config))
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        return MemoryEstimate(
            frozen=sum(frozen_bytes(name, p, config) for name, p in model.named_parameters() if not p.requires_grad),
            trained=trained,
            moments=round(moment_share(config.train) * trained),
            buckets=trained if self.world_size > 1 else 0,
            listeners=trained * len(listener_paths(config)),
            language=0,
            layer_gradients=self.layer.kept,
            mask_decoder=measure_mask_decoder(model, train.batch_size * frames, objects * frames + absent),
            logits=5 * min(tokens, LOGITS_AT_ONCE) * vocabulary * 4,
            losses=6 * objects * frames * sizes.mask_size**2 * 4,
            features=window * (frames * frame + views * sizes.most_tiles * tile) * 4,
            rollout=max(self._generation(window), measure_mask_decoder(model, train.batch_size, scored)),
        )

    def _generation(self, images: int) -> int:
        """Return the bytes of the prefixes of all images of a window, and of the rows that are written at once."""
        config, size = self.config, 4 if precision(self.config) == "no" else 2
        sizes, regions = geometry(config), config.data.regions_per_image
        cells = sizes.grid_size**2
        prefix = cells * sizes.most_tiles + TEXT_TOKENS
        row = row_bytes(self.model, prefix + cells + TEXT_TOKENS + config.loop.max_new_tokens, size)
        most = config.loop.rollout_batch_size or GPU_ROWS[-1]
        if config.speed.memory_gib is not None:
            most = min(most, max(1, int(config.speed.memory_gib * GIB * CACHE_SHARE) // row))
        rows = min(most, images * regions * captions_written(config))
        return images * row_bytes(self.model, prefix, size) + rows * row

    def estimate(self, recomputed: int) -> MemoryEstimate:
        """Return the estimate where the first ``recomputed`` decoder layers are recomputed."""
        return replace(self.without_layers, language=peak_bytes(self.layer, self.layers, recomputed))

    def decide(self, free_bytes: float | None) -> LayerPlan:
        """Return the choice for ``free_bytes``; without them, all layers where the setting leaves it open."""
        images = self.config.train.batch_size
        needed = [self.estimate(count).micro_batch for count in range(self.layers + 1)]
        if free_bytes is None or (self.wanted is not None and not self.is_choice):
            chosen, by = (self.layers, "default") if self.wanted is None else (self.wanted, "setting")
            return LayerPlan(chosen, self.layers, by, images, None, needed[chosen] / GIB)
        encoders = [self.model.mllm.model.vision_tower, self.model.grounding_encoder.vision_encoder]
        # What an encoder keeps that trains is not estimated.
        trains = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        counts: Sequence[int] = [self.layers] if trains else range(self.layers + 1)
        counts = counts if self.wanted is None else [self.wanted]
        fitting = [count for count in counts if needed[count] <= SHARE_USED * free_bytes]
        chosen = min(fitting, default=counts[-1])
        free, needs = free_bytes / GIB, needed[chosen] / GIB
        return LayerPlan(chosen, self.layers, "memory", images, free, needs, bool(fitting))


def frozen_bytes(name: str, parameter: Tensor, config: Config) -> int:
    """Return the bytes of a frozen parameter, packed where ``model.quantize`` packs it."""
    is_packed = config.model.quantize == "nf4" and name.endswith(".base_layer.weight")
    return round(parameter.numel() * (quantize.BYTES if is_packed else parameter.element_size()))


def moment_share(config: TrainConfig) -> float:
    """Return the bytes of Adam's two moments, as a part of the float32 parameters'.

    In eight bits each block of 256 values has a float32 beside it (2110.02861).
    """
    return 2.0 if config.optimizer == "adamw" else 2 * (1 + 4 / 256) / 4


def estimators(
    config: Config, model: Any, device_type: str | None = None, world_size: int = 1
) -> Sequence[MemoryEstimator]:
    """Return an estimator for every number of images that may have a graph at a time, the most welcome first.

    There are several where ``speed.images_at_once`` is ``fit``, on a GPU: the first fills :data:`BUSY_TOKENS`, since
    more images would only take memory from activations that could be kept, and each of the others has half as many.

    Args:
        config, model, world_size: as :class:`MemoryEstimator`'s, but micro-batches as they are loaded.
        device_type: ``cuda``, or ``cpu``, which takes a micro-batch in parts; None goes by ``train.device``.
    """
    kind = device_type or ("cpu" if config.train.device == "cpu" else "cuda")
    whole = as_computed(config, kind)
    if config.speed.images_at_once != "fit" or kind == "cpu" or config.train.parallel == "fsdp":
        return [MemoryEstimator(whole, model, world_size)]
    rows, length = shape_of_rows(whole)
    images = whole.train.batch_size
    busy = max(1, -(-BUSY_TOKENS * images // (rows * length)))
    count = -(-images // -(-images // busy))  # parts of like size
    counts = [count]
    while count > 1:
        count = -(-count // 2)
        counts.append(count)
    parts = [replace(config, speed=replace(config.speed, images_at_once=str(count))) for count in counts]
    return [MemoryEstimator(as_computed(part, kind), model, world_size, is_choice=True) for part in parts]


def decide_by_memory(
    choices: Sequence[MemoryEstimator], accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> LayerPlan:
    """Decide by the memory that is free now, the same on all ranks, and set the model; every rank calls this.

    Call it when all that stays is in place: weights on their device, weight average, saved optimiser state. Where
    the settings decide, ``build_model`` has done it and nothing is measured.
    """
    first = choices[0]
    if first.wanted is not None and not first.is_choice:
        return LayerPlan(first.wanted, first.layers, "setting", first.config.train.batch_size)
    accelerator.wait_for_everyone()  # a rank that is still loading has not taken its memory yet
    free = free_memory(first.config, accelerator.device) - still_to_come(accelerator, optimizer, first.config.train)
    plans = gather_objects(accelerator, first_that_fits(choices, max(free, 0.0)))
    plan = max(plans, key=lambda plan: (-plan.images, plan.recomputed))
    checkpoint_first(first.model, plan.recomputed)
    return plan


def first_that_fits(choices: Sequence[MemoryEstimator], free_bytes: float | None) -> LayerPlan:
    """Return the plan of the first choice that fits ``free_bytes``, else of the last one."""
    plans = [choice.decide(free_bytes) for choice in choices]
    return next((plan for plan in plans if plan.fits), plans[-1])


def estimate_memory(config: Config, model: Any, memory_gib: float | None = None) -> tuple[MemoryEstimate, LayerPlan]:
    """Return the estimate of one of ``WORLD_SIZE`` processes, and the layers that recompute their activations in it.

    Args:
        config: the whole configuration.
        model: on the meta device.
        memory_gib: what a process may use, where ``speed.checkpoint_layers`` is ``auto``; None takes
            ``speed.memory_gib``, and without that all layers are recomputed.
    """
    choices = estimators(config, model, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    memory, state = memory_gib or config.speed.memory_gib, choices[0].without_layers.state
    plan = first_that_fits(choices, None if memory is None else max(memory * GIB - state, 0.0))
    chosen = next(choice for choice in choices if choice.config.train.batch_size == plan.images)
    return chosen.estimate(plan.recomputed), plan


def peak_bytes(layer: LayerMemory, layers: int, recomputed: int) -> int:
    """Return the most bytes that ``layers`` decoder layers hold where the first ``recomputed`` keep their input alone.

    When the backward pass reaches a recomputed layer, the others have let their activations go.
    """
    held = (layers - recomputed) * layer.kept
    return recomputed * layer.entry + (max(held, layer.kept) if recomputed else held)


def shape_of_rows(config: Config) -> tuple[int, int]:
    """Return rows and length (tokens) of a long micro-batch of step 2.

    A packed row holds the image and, for every region, its question, caption and answer, and the captions with graph.
    Region prompts take the cells of their masks; the masks of an image are taken to cover it once.
    """
    data, images, sizes = config.data, config.train.batch_size, geometry(config)
    with_graph, cells = captions_with_graph(config), sizes.grid_size**2
    image = cells * sizes.most_tiles * target_frames(config) + TEXT_TOKENS
    text, turns = TEXT_TOKENS + config.loop.max_new_tokens, data.regions_per_image * (1 + with_graph)
    turns += config.loss.no_target_weight > 0
    # The captions of a frame pair belong to the other frame, which gets a row of its own.
    has_pairs = data.sav_dir is not None and with_graph > 0
    return images * (2 if has_pairs else 1), image + turns * text + with_graph * cells


def target_frames(config: Config) -> int:
    """Return the frames that step 2 reads and segments of an image: more than one of a clip."""
    return config.data.sav_frames - 1 if config.data.sav_dir is not None else 1


def captions_written(config: Config) -> int:
    """Return the captions that step 1 writes of a region: the greedy one, and those that are sampled."""
    estimator = caption_gradient(config.policy, config.reward)
    return 1 + (config.policy.captions_per_region if estimator.endswith(("scst", "grpo")) else 0)


def captions_with_graph(config: Config) -> int:
    """Return the captions of a region that step 2 reads with graph, besides the one that it segments from."""
    estimator = caption_gradient(config.policy, config.reward)
    taught = config.loop.caption_supervision + (config.loss.recaption_weight > 0)
    taught *= config.data.refcoco_dir is not None
    sampled = max(captions_written(config) - 1, int(config.policy.kl_weight > 0))
    return max(sampled + ("gumbel" in estimator), taught)


# ---- what is measured without computing it ---------------------------------------------------------------------------

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def saved_bytes(module: nn.Module, inputs: Callable[[], Inputs], computes_in: str) -> int:
    """Return the bytes that a forward pass of ``module`` saves for its backward pass, each storage once.

    The module runs on CPU tensors without contents (``FakeTensorMode``): they take neither time nor memory, and choose
    the operations of a CPU, whose attention kernel saves queries, keys, values and output, as those of GPUs do.

    Args:
        module: its parameters may be on the meta device; neither they nor its buffers are counted.
        inputs: makes positional arguments, and keyword arguments, which others share and which are not counted.
        computes_in: accelerate's name of the precision.
    """
    saved: dict[int, Tensor] = {}  # tensors are kept: the address of a storage that is gone could come again

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), torch.device("cpu"):
        state = {
            name: torch.empty(value.shape, dtype=value.dtype).requires_grad_(value.requires_grad)
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        arguments, options = inputs()
        given = [part for value in options.values() for part in (value if isinstance(value, tuple) else (value,))]
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            autocast("cpu", computes_in),
        ):
            functional_call(module, state, arguments, options)
        for tensor in (*state.values(), *given):
            saved.pop(tensor.untyped_storage()._cdata, None)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def measure_layer(model: Any, rows: int, length: int, computes_in: str) -> LayerMemory:
    """Return what one decoder layer keeps of ``rows`` packed rows of ``length`` tokens (:func:`saved_bytes`)."""
    language = model.mllm.model.language_model
    layer, config, dtype = language.layers[0], language.config, language.embed_tokens.weight.dtype

    def inputs() -> Inputs:
        # The input has a history, as in the real model.
        entry = torch.empty(rows, length, config.hidden_size, dtype=dtype).requires_grad_() * 1
        return (entry,), {
            "attention_mask": torch.empty(rows, 1, length, length, dtype=dtype),
            "position_ids": torch.empty(rows, length, dtype=torch.long),
            "position_embeddings": tuple(torch.empty(rows, length, head_width(config), dtype=dtype) for _ in range(2)),
        }

    before = layer.training, layer.gradient_checkpointing
    layer.train()
    layer.gradient_checkpointing = False
    try:
        kept = saved_bytes(layer, inputs, computes_in)
    finally:
        layer.train(before[0])
        layer.gradient_checkpointing = before[1]
    return LayerMemory(kept, rows * length * config.hidden_size * dtype.itemsize)


def measure_mask_decoder(model: Any, images: int, objects: int) -> int:
    """Return the bytes that SAM 2's mask decoder, in float32, keeps of ``objects`` on ``images``."""
    sam, dtype = model.grounding_encoder, next(model.grounding_encoder.parameters()).dtype

    def inputs() -> Inputs:
        sizes = [(model.grounding.level_width(k), model.mask_size // 2**k) for k in range(3)]
        levels = [torch.empty(images, channels, side, side, dtype=dtype) for channels, side in sizes]
        width = sam.config.prompt_encoder_config.hidden_size
        embeds = torch.empty(objects, width, dtype=dtype).requires_grad_() * 1
        return (embeds, levels, torch.zeros(objects, dtype=torch.long)), {}

    return saved_bytes(_MaskDecoding(model.grounding), inputs, "no")


class _MaskDecoding(nn.Module):
    """The part of the grounding that has a graph, as a module."""

    def __init__(self, grounding: GroundingDecoder) -> None:
        super().__init__()
        self.sam, self.grounding = grounding.sam, grounding

    def forward(self, embeds: Tensor, levels: list[Tensor], index: Tensor) -> Tensor:
        finished = self.grounding.finish(levels)
        return self.grounding.decode_candidates(self.grounding.sparse_prompts(embeds), finished, index)[0]


# ---- what a process has ----------------------------------------------------------------------------------------------


def free_memory(config: Config, device: torch.device) -> float:
    """Return the bytes that this process may still take: what is free on a GPU, at most ``speed.memory_gib`` in all.

    On a CPU, where ``speed.memory_gib`` wins, the memory of the machine, or of its control group, is shared out evenly
    to the processes of the machine.
    """
    stated = config.speed.memory_gib
    if device.type == "cuda":
        own = torch.cuda.memory_allocated(device)
        free = float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - own)
        return free if stated is None else min(free, stated * GIB - own)
    import psutil

    if stated is not None:
        return stated * GIB - float(psutil.Process().memory_info().rss)
    free = float(psutil.virtual_memory().available)
    return min(free, _group_memory(free)) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _group_memory(otherwise: float, root: Path = CGROUP) -> float:
    """Return the bytes that the control group of a container leaves, ``otherwise`` where it sets no limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        counters: Mapping[str, str] = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return otherwise
    # Files that were read and not used since are given up on demand.
    return otherwise if limit == "max" else float(int(limit) - used + int(counters.get("inactive_file", 0)))


def still_to_come(accelerator: Accelerator, optimizer: torch.optim.Optimizer, config: TrainConfig) -> float:
    """Return the bytes of gradients and Adam moments that do not exist before the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in parameters]
    size = float(sum(parameter.numel() * parameter.element_size() for parameter in own))
    # With several ranks gradients live in DDP's buckets, which exist already.
    gradients = 0.0 if accelerator.num_processes > 1 else size
    return gradients + (0.0 if optimizer.state else moment_share(config) * size)
