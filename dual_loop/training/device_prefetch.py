"""What feeds a step: this rank's part of the data, in windows on the device, in parts that hold a graph at once.

The micro-batches of the next optimiser step may be copied ahead (``speed.prefetch_to_device``): on a GPU by a stream of
their own, which the step's stream waits for before it reads.

Losses are sums divided by global counts, and everything random about a region has a seed of its own, so a micro-batch
may be run in parts of fewer images (``speed.images_at_once``), each with its backward pass, for the same gradients up
to rounding and the activations of a part.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator

from dual_loop.config import Config
from dual_loop.data.dataset import SkipLedger
from dual_loop.data.dataset_builder import build_dataset, build_loader, check_costs, describe
from dual_loop.data.mixture import WindowedBatchSampler
from dual_loop.model.build import geometry
from dual_loop.types import Batch, RegionSample


class DataStream:
    """This rank's micro-batches, their position, and what was skipped.

    Attributes:
        ledger: counts skipped samples of all ranks, the same on every rank.
        table: printed table of the sources.
        steps_per_epoch: optimiser steps; num_samples: draws of an epoch; source_names: of all sources.

    Raises:
        ConfigError: a data set cannot be opened, or the shares are impossible.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        train, data = config.train, config.data
        # Rank 0 lists the folders and writes the index; the others then read it.
        with accelerator.main_process_first():
            self.dataset = build_dataset(config, geometry(config))
        stream = self.dataset.stream
        ranks = accelerator.num_processes, accelerator.process_index
        self.sampler = WindowedBatchSampler(stream, train.batch_size, *ranks, train.gradient_accumulation_steps)
        self.ledger = SkipLedger(data.max_bad_fraction, data.max_bad_grace)
        self.num_workers, self.pin_memory = data.num_workers, accelerator.device.type == "cuda"
        self.table = "\n".join([describe(self.dataset.sources, stream), *(f"  {text}" for text in check_costs())])
        self.steps_per_epoch, self.num_samples = self.sampler.steps_per_epoch, stream.epoch_length
        self.source_names: Sequence[str] = [share.name for share in stream.shares]

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Start the loader at optimiser step ``first_step`` (0-based)."""
        self.sampler.start_step = first_step
        seed = self.sampler.stream.seed
        return iter(build_loader(self.dataset, self.sampler, self.num_workers, self.pin_memory, seed))

    def samples(self, step: int, images: Sequence[int]) -> list[RegionSample]:
        """Read samples of optimiser step ``step`` (0-based) again, by their numbers among this rank's micro-batches."""
        keys = [key for micro_step in range(self.sampler.accumulation) for key in self.sampler.keys(step, micro_step)]
        return [self.dataset.sample(keys[image]) for image in images]

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


class DevicePrefetch:
    """Hands out the window of one optimiser step after the other, on ``device``, in parts of at most ``images``."""

    def __init__(self, batches: Iterator[Batch], config: Config, device: torch.device, images: int) -> None:
        self.batches, self.device = batches, device
        self.copies_ahead = config.speed.prefetch_to_device
        self._window, self._images = config.train.gradient_accumulation_steps, images
        self._stream: Any = torch.cuda.Stream(device) if self.copies_ahead and device.type == "cuda" else None
        self._next: list[Batch] | None = None
        self._timeout = config.train.rank_timeout

    def take(self) -> list[Batch]:
        """Return the next window in parts."""
        window = self._next if self._next is not None else self._copy()
        self._next = None
        if self._stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._stream)
            # Tell the allocator that this stream reads tensors that were made on another one.
            for value in (value for batch in window for value in vars(batch).values()):
                if isinstance(value, torch.Tensor) and value.is_cuda:
                    value.record_stream(computing)
        return split_window(window, self._images)

    def start_next(self) -> None:
        """Start to copy the window after the one that was taken, where ``speed.prefetch_to_device`` asks for it.

        The loader may be waited for here. Call it when the step has work queued, and not after the last step.
        """
        if self.copies_ahead and self._next is None:
            self._next = self._copy()

    def _copy(self) -> list[Batch]:
        # A process that was stopped would be waited for without end, also by the loader's own time-out.
        silence = threading.Timer(self._timeout, end_loaders)
        silence.start()
        try:
            with torch.cuda.stream(self._stream):  # of no effect with None
                return [next(self.batches).to(self.device, non_blocking=True) for _ in range(self._window)]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"DataLoader: a connection to a worker broke ({error})") from error
        finally:
            silence.cancel()


def end_loaders() -> None:
    """Kill the processes that load data; one that is stopped hears nothing else."""
    for process in multiprocessing.active_children():
        process.kill()


@atexit.register
def wake_loaders() -> None:
    """Let processes that load data and were stopped go on: multiprocessing would wait at exit for them for ever."""
    for pid in filter(None, (process.pid for process in multiprocessing.active_children())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def split_window(window: Sequence[Batch], count: int) -> list[Batch]:
    """Return the micro-batches of a window in parts of at most ``count`` images, in order."""
    return [batch.images(start, start + count) for batch in window for start in range(0, batch.num_images, count)]
