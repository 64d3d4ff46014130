"""A hollow task and data stream: everything that the trainer needs, in milliseconds.

The "model" is two linear layers; a region's loss depends on its own number alone, so every split of a global batch must
give the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from dual_loop.config import Config, load_config
from dual_loop.data.dataset import SkipLedger
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.training.run_folder import RunFolder
from dual_loop.training.trainer import Trainer
from dual_loop.types import (
    Batch,
    LossTerm,
    PackedBatch,
    RegionCaption,
    RegionSample,
    Segmentation,
    SkippedSample,
    StepOutput,
)

WIDTH = 4


class HollowModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(torch.tanh(self.first(inputs))))


class HollowTask(torch.nn.Module):
    """Loss terms with different counts, as the real ones; ``spoil`` turns one region's loss into NaN."""

    def __init__(self, spoil: str = "", noise: float = 0.0, fail: Exception | None = None) -> None:
        super().__init__()
        self.model = HollowModel()
        self.spoil, self.noise, self.fail, self.num_generated = spoil, noise, fail, 0

    def run_state(self) -> dict[str, Any]:
        return {"num_generated": self.num_generated}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        self.num_generated = state["num_generated"]

    def prepare(self, batches: Sequence[Batch], progress: float = 0.0, audit: bool = False) -> list[PackedBatch]:
        self.num_generated += sum(batch.num_regions for batch in batches)
        return [self._pack(batch) for batch in batches]

    def _pack(self, batch: Batch) -> PackedBatch:
        # Regions with odd seeds have no tokens: ranks and micro-batches get uneven counts.
        number, nothing = batch.num_regions, torch.zeros(0)
        tokens = 3.0 * sum(seed % 2 == 0 for seed in batch.region_seeds.tolist())
        return PackedBatch(
            batch=batch,
            captions=[RegionCaption("a star") for _ in range(number)],
            input_ids=nothing,
            position_ids=nothing,
            attention_mask=nothing,
            row_lengths=[],
            read_from=0,
            row_tiles=[],
            region_tile=nothing,
            prompt_masks=nothing,
            seg_positions=nothing,
            answer_positions=nothing,
            answer_ids=nothing,
            region_weights=torch.ones(number),
            counts={"mask_loss": float(number), "dice_loss": float(number), "llm_loss": tokens},
            metrics={"caption/rejected": 1.0},
        )

    def forward(self, packed: PackedBatch) -> StepOutput:
        if self.fail is not None:
            raise self.fail
        seeds = packed.batch.region_seeds
        inputs = torch.sin(seeds[:, None] * torch.arange(1.0, WIDTH + 1))
        if self.noise:
            inputs = inputs + self.noise * torch.randn_like(inputs)
        out = self.model(inputs)
        if self.spoil:
            factors = [float("nan") if name == self.spoil else 1.0 for name in packed.batch.region_names]
            out = out * torch.tensor(factors)[:, None]
        even = (seeds % 2 == 0).float()
        terms = {
            "mask_loss": LossTerm(out[:, 0].square().sum() * 2, float(len(seeds))),
            "dice_loss": LossTerm(out[:, 1].cos().sum(), float(len(seeds))),
            "llm_loss": LossTerm(((out - 1).square().mean(1) * even * 3).sum(), float(3 * even.sum())),
        }
        # Half of each target, which is all of its image.
        logits = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).repeat(len(seeds), 1, 1)
        scores = torch.ones(len(seeds), 1)
        return StepOutput(terms, Segmentation(logits, scores, torch.zeros(len(seeds), dtype=torch.int64), scores))


class HollowData:
    """Slots 0, 1, 2, ... in the order of the real sampler: step, micro-batch, rank, item."""

    source_names = ("sav", "sa1b")
    steps_per_epoch = 4

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1) -> None:
        train = config.train
        self.size, self.accumulation = train.batch_size, train.gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.ledger = SkipLedger(1.0, 0)

    def slots(self, step: int, micro_step: int) -> list[int]:
        first = ((step * self.accumulation + micro_step) * self.world_size + self.rank) * self.size
        return list(range(first, first + self.size))

    def batches(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            for micro_step in range(self.accumulation):
                yield self._batch(self.slots(step, micro_step))
            step += 1

    def _batch(self, slots: list[int]) -> Batch:
        count, empty = len(slots), torch.zeros(len(slots), 0)
        sources = [self.source_names[slot % 2] for slot in slots]
        return Batch(
            pixel_values=empty,
            tiles_per_view=[1] * count,
            caption_view=list(range(count)),
            target_view=list(range(count)),
            g_pixel_values=empty,
            prompt_masks=empty,
            grid_rescued=torch.zeros(count, dtype=torch.bool),
            target_masks=torch.ones(count, 2, 2),
            region_image=torch.arange(count),
            region_seeds=torch.tensor(slots),
            captions=[None] * count,
            region_names=[f"{source}/{slot}#0" for source, slot in zip(sources, slots, strict=True)],
            sources=sources,
            skipped=[SkippedSample("sav", f"bad{slot}", "broken", "broken") for slot in slots if slot % 5 == 3],
        )

    def samples(self, step: int, images: Sequence[int]) -> list[RegionSample]:
        import numpy as np

        image, masks = np.zeros((6, 8, 3), np.uint8), np.ones((1, 6, 8), bool)
        every = [slot for micro_step in range(self.accumulation) for slot in self.slots(step, micro_step)]
        slots = [every[image] for image in images]
        return [RegionSample(self.source_names[s % 2], str(s), image, masks, ("0",), ((),)) for s in slots]

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"step": step, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ledger.load_state_dict(state["ledger"])


def make_trainer(
    output_dir: Any,
    task: HollowTask | None = None,
    lines: list[str] | None = None,
    images_at_once: str = "all",
    eval_dir: str | None = None,
    **train: Any,
) -> Trainer:
    """Build a trainer of hollow parts; ``train`` are settings of ``TrainConfig``."""
    settings = {
        **{"output_dir": str(output_dir), "device": "cpu", "batch_size": 1, "gradient_accumulation_steps": 2},
        **{"max_steps": 4, "learning_rate": 0.05, "log_interval": 1, "save_interval": 100, "panel_interval": 100},
        **train,
    }
    others = {"model.dtype": "float32", "speed.images_at_once": images_at_once, "data.eval_dir": eval_dir}
    config = load_config(None, {f"train.{key}": value for key, value in settings.items()} | others)
    AcceleratorState._reset_state()
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True)
    folder = RunFolder(output_dir, accelerator.is_main_process)
    folder.create(config.to_dict(), {}, resuming=config.train.resume is not None)
    data = HollowData(config, accelerator.process_index, accelerator.num_processes)
    report = (lines if lines is not None else []).append
    task = task or HollowTask()
    average = ExponentialMovingAverage(trainable_parameters(task.model), config.train.ema_decay)
    return Trainer(config, task, average, data, accelerator, folder, report)
