"""The three stages that make the tiny checkpoint. Each part learns alone before they learn together.

1. SAM 2 from point prompts (masks only) with an auxiliary class map. All three candidates learn alike, and the IoU head
   learns to rank them. (Letting only the best candidate learn, as SAM does for ambiguous points, fails here: the three
   share the objects of a scene out among them and never look at the point.)
2. The vision tower from class maps on the token grid. Every token also tells its own row and column: nothing else in
   this stage asks for places, and the frozen tower of stage 3 has to bring them.
3. Everything together on a small captioned part: describe a region, segment a description. An alignment loss draws
   the projected [SEG] embedding to SAM 2's own prompt embedding of the region's centre,
   and to its cells; without it the [SEG] path does not leave the floor in the time that a laptop has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_loop.loop.packing import RowPlan, pack_turns, step_turns
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.loop.signals.alignment import latent_alignment
from dual_loop.metrics import iou_table
from dual_loop.types import Batch, RegionCaption

from tiny.scenes import COLOUR_NAMES, SHAPES, ScenePool, class_maps


def region_points(batch: Batch, side: int, generator: torch.Generator) -> Tensor:
    """One random pixel inside every target mask, in pixels of the SAM 2 input: (N, 2) as (x, y)."""
    points = []
    scale = side / batch.target_masks.shape[-1]
    for mask in batch.target_masks:
        inside = mask.nonzero()
        pick = inside[int(torch.randint(len(inside), (1,), generator=generator))] if len(inside) else mask.new_zeros(2)
        points.append((pick.flip(0).float() + 0.5) * scale - 0.5)
    return torch.stack(points)


def region_centres(batch: Batch, side: int) -> Tensor:
    """The pixel of every target mask that is nearest to its centre of mass, as :func:`region_points` gives it."""
    points = []
    scale = side / batch.target_masks.shape[-1]
    for mask in batch.target_masks:
        inside = mask.nonzero().float()
        nearest = (inside - inside.mean(0)).square().sum(1).argmin() if len(inside) else 0
        points.append(((inside[nearest] if len(inside) else torch.zeros(2)).flip(0) + 0.5) * scale - 0.5)
    return torch.stack(points)


def index_batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def run(
    name: str,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    parameters: list[nn.Parameter],
    pool: ScenePool,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with warm-up and cosine decay; prints the running figures ten times."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    batches, started = index_batches(len(pool), batch_size, generator), time.time()
    shown: dict[str, float] = {}
    for step in range(steps):
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(scale, 0.02)
        loss, figures = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step()
        for key, value in figures.items():
            shown[key] = 0.95 * shown.get(key, value) + 0.05 * value
        if (step + 1) % max(1, steps // 10) == 0:
            text = " ".join(f"{key}={value:.3f}" for key, value in shown.items())
            print(f"{name} step {step + 1}/{steps} {time.time() - started:.0f}s {text}", flush=True)


def train_sam(model: Any, pool: ScenePool, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Stage 1."""
    sam, grounding = model.grounding_encoder, model.grounding
    side = sam.prompt_encoder.input_image_size
    width = sam.hidden_dim
    heads = nn.ModuleList([nn.Conv2d(width, len(SHAPES) + 1, 1), nn.Conv2d(width, len(COLOUR_NAMES) + 1, 1)])
    generator = torch.Generator().manual_seed(seed)

    def loss_of(indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch, shapes, colours = pool.batch(indices)
        features = model.encode_grounding(batch.g_pixel_values)
        levels = grounding.finish(features)
        points = region_points(batch, side, generator)
        masks, ious, _ = grounding.decode_candidates(grounding.point_prompts(points), levels, batch.region_image)
        losses, true_ious = candidate_losses(masks, batch.target_masks)
        mask_loss = losses.mean()
        auxiliary = torch.zeros(())
        for level in features[1:]:
            small = F.interpolate(batch.target_masks[None].float(), size=level.shape[-2:], mode="area")[0] > 0.4
            for head, classes in zip(heads, (shapes, colours), strict=True):
                auxiliary = auxiliary + F.cross_entropy(head(level), class_maps(batch, small, classes))
        loss = mask_loss + F.mse_loss(ious, true_ious) + 0.5 * auxiliary
        best = true_ious[torch.arange(len(ious)), ious.argmax(1)].mean()
        return loss, {"mask": float(mask_loss.detach()), "aux": float(auxiliary.detach()), "iou": float(best)}

    parameters = [*sam.parameters(), *heads.parameters()]
    run("sam", loss_of, parameters, pool, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)


def candidate_losses(masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and true IoU (N, candidates) of every candidate; 2 x cross-entropy + 1 x dice."""
    target = targets[:, None].expand_as(masks).flatten(2).float()
    logits = masks.flatten(2)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(-1)
    dice = 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    predicted, inside = logits > 0, target > 0
    union = (predicted | inside).sum(-1).clamp_min(1)
    return 2 * entropy + dice, (predicted & inside).sum(-1) / union


def train_vision(model: Any, pool: ScenePool, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Stage 2."""
    tower = model.mllm.model.vision_tower
    width = tower.config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, len(SHAPES) + 1), nn.Linear(width, len(COLOUR_NAMES) + 1)])
    grid_size = int(model.mllm.config.image_seq_length**0.5)
    places = nn.ModuleList([nn.Linear(width, grid_size), nn.Linear(width, grid_size)])
    rows = torch.arange(grid_size).repeat_interleave(grid_size)
    columns = torch.arange(grid_size).repeat(grid_size)

    def loss_of(indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch, shapes, colours = pool.batch(indices)
        tokens = model.encode_vision(batch.pixel_values)
        loss, figures = torch.zeros(()), {}
        for head, place in zip(places, (rows, columns), strict=True):
            loss = loss + 0.3 * F.cross_entropy(head(tokens).flatten(0, 1), place.repeat(len(tokens)))
        for name, head, classes in zip(("shape", "colour"), heads, (shapes, colours), strict=True):
            target = class_maps(batch, batch.prompt_masks, classes).flatten(1)
            logits = head(tokens)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten())
            inside = target > 0
            figures[name] = float((logits.argmax(-1) == target)[inside].float().mean())
        return loss, figures

    parameters = [*tower.parameters(), *heads.parameters(), *places.parameters()]
    run("vision", loss_of, parameters, pool, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)


@torch.no_grad()
def grid_prompts(grounding: Any, side: int, grid_size: int) -> Tensor:
    """SAM 2's own prompt embeddings of the centres of all grid cells: (G * G, C), row-major."""
    centres = (torch.arange(grid_size) + 0.5) * side / grid_size - 0.5
    points = torch.stack(torch.meshgrid(centres, centres, indexing="ij")[::-1], -1).reshape(-1, 2)
    return grounding.point_prompts(points)[:, 0, 0]


def cell_cross_entropy(seg_embeds: Tensor, cell_prompts: Tensor, prompt_masks: Tensor) -> Tensor:
    """Cross-entropy between the cells that an embedding is close to and the cells under the region's mask."""
    logits = seg_embeds @ cell_prompts.T / cell_prompts.shape[1] ** 0.5
    target = prompt_masks.flatten(1).float()
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True))


def train_together(
    model: Any,
    prompter: Any,
    loop_config: Any,
    loss_config: Any,
    pool: ScenePool,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    *,
    align_weight: float,
    segment: bool,
    encoder_scale: float = 1.0,
) -> None:
    """Stage 3; with ``segment`` false only captions are learned."""
    sam, grounding = model.grounding_encoder, model.grounding
    side = sam.prompt_encoder.input_image_size
    cell_prompts = grid_prompts(grounding, side, pool.prepared[0].prompt_masks.shape[-1])

    def loss_of(indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch, _, _ = pool.batch(indices)
        captions = [RegionCaption(caption or "", is_reference=True) for caption in batch.captions]
        if not segment:
            plan = RowPlan.for_captions(captions)
            turns = [turn for turn in step_turns(batch, captions, plan, prompter, loop_config) if turn.is_caption]
            vision = model.encode_vision(batch.pixel_values)
            packed = pack_turns(batch, captions, turns, prompter, vision=vision, segments=False)
            rows, columns = packed.answer_positions
            hidden = model.read(model.embed(packed), packed)[rows, columns]
            loss = model.token_loss(hidden, packed.answer_ids) / packed.counts["llm_loss"]
            return loss, {"llm": float(loss.detach())}
        output = compute_segmentation_loss(model, batch, captions, prompter, loop_config, loss_config)
        loss = torch.stack([term.mean for term in output.terms.values()]).sum()
        figures = {name.split("_")[0]: float(term.mean.detach()) for name, term in output.terms.items()}
        embeds = output.masks.seg_embeds
        if align_weight > 0:
            target = grounding.point_prompts(region_centres(batch, side))[:, 0, 0].detach()
            align = latent_alignment(embeds, target, align_weight).mean
            cells = cell_cross_entropy(embeds, cell_prompts, batch.prompt_masks)
            loss = loss + align + cells
            figures.update(align=float(align.detach()), cells=float(cells.detach()))
        overlaps = iou_table(output.masks.mask_logits.detach() > 0, batch.binary_targets).diagonal()
        figures["iou"] = float(overlaps.mean())
        return loss, figures

    parameters = [p for p in model.parameters() if p.requires_grad]
    run(
        "together" if segment else "captions",
        *(loss_of, parameters, pool),
        **dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed),
    )
