"""How many decoder layers recompute their activations: as few as the memory allows (``speed.checkpoint_layers``).

::

    peak(n) = n inputs + the larger of (layers - n) kept and, where n > 0, one kept
    wanted: the smallest n with  peak(n) + the rest  <=  SHARE_USED x free memory

What a layer keeps, and what SAM 2's mask decoder keeps, is measured on tensors without contents
(``model.checkpointing``); the rest is counted in :func:`other_bytes`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dual_loop.config import Config, caption_gradient
from dual_loop.model.build import geometry
from dual_loop.model.checkpointing import (
    LayerMemory,
    checkpoint_first,
    measure_layer,
    measure_mask_decoder,
    requested_layers,
)
from dual_loop.training.devices import precision
from dual_loop.training.guard import gather_objects

GIB = 2**30
SHARE_USED = 0.85
"""Of the free memory: the rest is for fragments, workspaces, and rows longer than estimated."""
TEXT_TOKENS = 48
"""Of a question with its answer around a caption, roughly."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class LayerPlan:
    """How many layers recompute their activations, and why.

    Attributes:
        recomputed: the first so many decoder layers.
        layers: decoder layers in all.
        chosen_by: ``setting``, ``memory``, or ``default`` where memory should decide and is not known.
        free_gib: memory that was free for a micro-batch; None where the setting decided.
        needed_gib: estimate of what a micro-batch takes with this choice; None where nothing was measured.
        fits: False where even recomputing all layers leaves the estimate above ``SHARE_USED`` of what is free.
    """

    recomputed: int
    layers: int
    chosen_by: str
    free_gib: float | None = None
    needed_gib: float | None = None
    fits: bool = True

    def line(self) -> str:
        """Return one line for the start of a run."""
        text = f"Checkpointing: {self.recomputed} of {self.layers} decoder layers recomputed ({self.chosen_by}"
        if self.needed_gib is not None:
            text += f": about {self.needed_gib:.2f} GiB a micro-batch"
        if self.free_gib is not None:
            text += f", {self.free_gib:.2f} GiB free"
        return text + (")" if self.fits else "; this may not fit: lower --batch_size or --regions_per_image)")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


class LayerPlanner:
    """Measures one layer of a model that was just built, and later decides by the memory that is left.

    Args:
        config: the whole configuration.
        model: a ``VideoLLaVASAMModel``, neither packed nor sharded; may be on the meta device.
    """

    def __init__(self, config: Config, model: Any) -> None:
        self.config, self.model = config, model
        self.layers = len(model.mllm.model.language_model.layers)
        autocast = precision(config) == "bf16"
        self.layer: LayerMemory = measure_layer(model, *shape_of_rows(config), autocast)
        objects = config.train.batch_size * config.data.regions_per_image
        decoder = measure_mask_decoder(model, config.train.batch_size, objects, autocast)
        self.other = other_bytes(config, model, self.layer) + decoder

    def language(self, recomputed: int) -> int:
        """Return the bytes that all decoder layers hold at most where the first ``recomputed`` are recomputed."""
        return peak_bytes(self.layer, self.layers, recomputed)

    def peak(self, recomputed: int) -> int:
        """Return the bytes of a micro-batch where the first ``recomputed`` layers are recomputed."""
        return self.language(recomputed) + self.other

    def decide(self, free_bytes: float | None) -> LayerPlan:
        """Return the choice for ``free_bytes``; without them, all layers where the setting leaves it open."""
        wanted = requested_layers(self.config, self.layers)
        if wanted is not None or free_bytes is None:
            recomputed = self.layers if wanted is None else wanted
            chosen_by = "default" if wanted is None else "setting"
            return LayerPlan(recomputed, self.layers, chosen_by, None, self.peak(recomputed) / GIB)
        counts = range(self.layers + 1) if not trains_an_encoder(self.model) else [self.layers]
        fitting = [count for count in counts if self.peak(count) <= SHARE_USED * free_bytes]
        recomputed = min(fitting, default=self.layers)
        figures = free_bytes / GIB, self.peak(recomputed) / GIB
        return LayerPlan(recomputed, self.layers, "memory", *figures, fits=bool(fitting))

    def apply(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> LayerPlan:
        """Decide by the memory that is free now, the same on all ranks, and set the model; every rank calls this.

        Call it when all that stays is in place: weights on their device, weight average, saved optimiser state.
        """
        accelerator.wait_for_everyone()  # a rank that is still loading has not taken its memory yet
        free = free_memory(self.config, accelerator.device) - still_to_come(self.config, accelerator, optimizer)
        plans = gather_objects(accelerator, self.decide(max(free, 0.0)).as_dict())
        plan = LayerPlan(**max(plans, key=lambda plan: plan["recomputed"]))
        checkpoint_first(self.model, plan.recomputed)
        return plan


def layer_planner(config: Config, model: Any) -> LayerPlanner | None:
    """Return the planner where memory decides; None where the setting does, and ``build_model`` has done it."""
    layers = len(model.mllm.model.language_model.layers)
    return LayerPlanner(config, model) if requested_layers(config, layers) is None else None


def plan_layers(
    planner: LayerPlanner | None, config: Config, model: Any, accelerator: Accelerator, optimizer: torch.optim.Optimizer
) -> LayerPlan:
    """Return what was chosen, by memory (:meth:`LayerPlanner.apply`) or by the setting."""
    if planner is not None:
        return planner.apply(accelerator, optimizer)
    layers = len(model.mllm.model.language_model.layers)
    return LayerPlan(requested_layers(config, layers) or 0, layers, "setting")


def peak_bytes(layer: LayerMemory, layers: int, recomputed: int) -> int:
    """Return the most bytes that ``layers`` decoder layers hold where the first ``recomputed`` keep their input alone.

    When the backward pass reaches a recomputed layer, the others have let their activations go.
    """
    held = (layers - recomputed) * layer.kept
    return recomputed * layer.entry + (max(held, layer.kept) if recomputed else held)


def other_bytes(config: Config, model: Any, layer: LayerMemory) -> int:
    """Return the bytes of a micro-batch beside decoder layers and mask decoder, at most.

    One layer's gradients; three float32 copies of a chunk of logits; masks, targets and gradients in the losses; the
    features of the frozen encoders for all images of the window.
    """
    train, sizes = config.train, geometry(config)
    images, regions = train.batch_size, config.data.regions_per_image
    tokens = images * regions * (TEXT_TOKENS + captions_with_graph(config) * config.loop.max_new_tokens)
    chunk = min(tokens, config.speed.cross_entropy_chunk or tokens)
    losses = 6 * images * regions * sizes.mask_size**2 * 4
    cells = sum(model.grounding.level_width(k) * (sizes.mask_size // 2**k) ** 2 for k in range(3))
    window = images * train.gradient_accumulation_steps * cells * 4
    return int(layer.kept + 3 * chunk * len_vocabulary(model) * 4 + losses + window)


def shape_of_rows(config: Config) -> tuple[int, int]:
    """Return rows and length (tokens) of a long micro-batch of step 2.

    A packed row holds the image and, for every region, its question, caption and answer, and the captions with graph.
    Region prompts take the cells of their masks; the masks of an image are taken to cover it once.
    """
    data, images, cells = config.data, config.train.batch_size, geometry(config).grid_size ** 2
    tiles = data.max_tiles + (data.max_tiles > 1)
    with_graph = captions_with_graph(config)
    image, text = cells * tiles + TEXT_TOKENS, TEXT_TOKENS + config.loop.max_new_tokens
    branches = data.regions_per_image * (1 + with_graph)
    if not config.speed.pack_branches:
        return images * branches, image + text + (cells if with_graph else 0)
    # The captions of a frame pair belong to the other frame, which gets a row of its own.
    has_pairs = data.sav_dir is not None and with_graph > 0
    return images * (2 if has_pairs else 1), image + branches * text + with_graph * cells


def captions_with_graph(config: Config) -> int:
    """Return the captions of a region that step 2 reads with graph, besides the one that it segments from."""
    estimator = caption_gradient(config.policy, config.reward)
    sampled = config.policy.captions_per_region if estimator.endswith(("scst", "grpo")) else 0
    taught = int(config.loop.caption_supervision and config.data.refcoco_dir is not None)
    return max(sampled + ("gumbel" in estimator), taught)


def trains_an_encoder(model: Any) -> bool:
    """Tell whether the vision tower or SAM 2's encoder train: what they keep is not estimated."""
    parts: list[nn.Module] = [model.mllm.model.vision_tower, model.grounding_encoder.vision_encoder]
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def len_vocabulary(model: Any) -> int:
    """Return V, the number of rows of the output head."""
    return int(model.mllm.lm_head.out_features)


def free_memory(config: Config, device: torch.device) -> float:
    """Return the bytes that this process may still take: of ``speed.memory_gib`` where given, else what is free.

    On a CPU the memory of the machine, or of its control group, is shared out evenly to the processes of the machine.
    """
    stated = config.speed.memory_gib
    if device.type == "cuda":
        if stated is not None:
            return stated * GIB - torch.cuda.memory_allocated(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
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


def still_to_come(config: Config, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of gradients and Adam moments that do not exist before the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in parameters]
    size = float(sum(parameter.numel() * parameter.element_size() for parameter in own))
    # With several ranks gradients live in DDP's buckets, which exist already.
    gradients = 0.0 if accelerator.num_processes > 1 and config.speed.bucket_view else size
    return gradients + (0.0 if optimizer.state else 2 * size)
