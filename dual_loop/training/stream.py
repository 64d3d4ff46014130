"""The trainer's view of the data: this rank's micro-batches, their position, and what was skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from dual_loop.config import Config
from dual_loop.data.dataset import DualLoopDataset
from dual_loop.data.dataset_builder import build_dataset, build_loader, describe
from dual_loop.data.mixture import WindowedBatchSampler
from dual_loop.data.prepare import Geometry
from dual_loop.data.skipped import SkipLedger
from dual_loop.types import Batch, RegionSample, SkippedSample


class DataStream:
    """Joins data set, sampler, loader and ledger; implements ``trainer.TrainingData``.

    Args:
        dataset: draws to prepared samples.
        sampler: this rank's part of the endless stream.
        ledger: counts skipped samples of all ranks, the same on every rank.
        num_workers: loader processes of this rank.
        pin_memory: for copies to a GPU.
        table: printed table of the sources.
    """

    def __init__(
        self,
        dataset: DualLoopDataset,
        sampler: WindowedBatchSampler,
        ledger: SkipLedger,
        num_workers: int,
        pin_memory: bool,
        table: str,
    ) -> None:
        self.dataset, self.sampler, self.ledger, self.table = dataset, sampler, ledger, table
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.steps_per_epoch = sampler.steps_per_epoch
        self.source_names: Sequence[str] = [share.name for share in sampler.stream.shares]
        self.num_samples = sampler.stream.epoch_length

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Start the loader at optimiser step ``first_step`` (0-based)."""
        self.sampler.start_step = first_step
        loader = build_loader(self.dataset, self.sampler, self.num_workers, self.pin_memory, self.sampler.stream.seed)
        return iter(loader)

    def samples(self, step: int, micro_step: int) -> list[RegionSample]:
        """Read the samples of one micro-batch again; the same draws give the same samples and regions."""
        return [self.dataset.sample(key) for key in self.sampler.keys(step, micro_step)]

    def record(self, skipped: Sequence[SkippedSample], consumed: Mapping[str, int]) -> None:
        """Count one step's samples of all ranks.

        Raises:
            SampleError: too many samples of a source were skipped.
        """
        self.ledger.record(skipped, consumed)

    def counters(self) -> dict[str, int]:
        return self.ledger.as_counters()

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return JSON values: the position after ``step`` steps, and the ledger."""
        return {"sampler": self.sampler.state_dict(step), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            CheckpointError: the data or the size of a step are not those of the checkpoint.
        """
        self.sampler.load_state_dict(state["sampler"])
        self.ledger.load_state_dict(state["ledger"])


def build_stream(config: Config, geometry: Geometry, accelerator: Accelerator) -> DataStream:
    """Open the data sets of ``config`` and place this rank in their stream.

    Raises:
        ConfigError: a data set cannot be opened, or the shares are impossible.
    """
    train = config.train
    # Rank 0 lists the folders and writes the index; the others then read it.
    with accelerator.main_process_first():
        dataset = build_dataset(config, geometry)
    sampler = WindowedBatchSampler(
        dataset.stream,
        train.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        train.gradient_accumulation_steps,
    )
    ledger = SkipLedger(config.data.max_bad_fraction, config.data.max_bad_grace)
    table = describe(dataset.sources, dataset.stream)
    return DataStream(dataset, sampler, ledger, config.data.num_workers, accelerator.device.type == "cuda", table)
