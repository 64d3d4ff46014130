"""Start-up as a chain of types, so that a wrong order does not type-check: Start -> Built -> Loaded -> Placed -> Ready.

::

    start   run folder, on ranks that are alike
    build   the model, empty where weights will fill it, and its prompts
    load    pretrained weights in it, and beside it listeners that were trained apart
    place   sharded where that is asked for, with its weight average
    wire    the task, the trainer, and what a checkpoint brings back
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from dual_loop.checkpoint.importer import build_to_load, load_weights, weights_sources
from dual_loop.config import Config, listener_paths
from dual_loop.loop.judge import Judge
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters, trainable_table
from dual_loop.model.build import build_prompter
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va_api import VideoLLaVASAMModel
from dual_loop.training import ranks
from dual_loop.training.changes import compare_with_run
from dual_loop.training.device_prefetch import DataStream
from dual_loop.training.devices import RankExchange, share_out_batch
from dual_loop.training.listeners import Listeners, read_listener
from dual_loop.training.memory import LayerPlan, MemoryEstimator, decide_by_memory, estimators
from dual_loop.training.metrics_log import Reporter
from dual_loop.training.run_folder import RunFolder, check_free, find_checkpoint, versions
from dual_loop.training.sharding import Gathered, shard_language_model
from dual_loop.training.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """Where a run computes and what it writes to; ``config`` as it was written to the run folder.

    ``checkpoint`` is what the run goes on from, None for a fresh start.
    """

    config: Config
    accelerator: Accelerator
    folder: RunFolder
    report: Reporter
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Built:
    """A model on its device; ``sources`` are the weights that are to be loaded. Without any, its own are random."""

    model: VideoLLaVASAMModel
    prompter: Prompter
    sources: list[Path]


@dataclass(frozen=True)
class Loaded:
    """A model with the weights that training starts from, and what its layers will need."""

    model: VideoLLaVASAMModel
    prompter: Prompter
    memory: Sequence[MemoryEstimator]
    listeners: Listeners


@dataclass(frozen=True)
class Placed(Loaded):
    """A model on its device, with its weight average; ``gathered`` where ranks share its layers."""

    average: ExponentialMovingAverage
    gathered: Gathered | None


@dataclass(frozen=True)
class Ready:
    """A trainer that may start or go on."""

    trainer: Trainer
    layers: LayerPlan


def start(config: Config, accelerator: Accelerator) -> Start:
    """Make the run folder, on rank 0, after every rank found it free and all of them alike.

    Raises:
        ConfigError: the ranks differ in a setting, a package or the weights; the folder holds another run; or a run
            cannot go on with what was changed.
    """
    report = Reporter(accelerator.is_main_process)
    report.set_up_logging()
    checkpoint = find_checkpoint(config.train.resume, config.train.output_dir)
    ranks.compare({**describe_start(config), "checkpoint": checkpoint})
    config = share_out_batch(config, accelerator.num_processes)
    folder = RunFolder(config.train.output_dir, accelerator.is_main_process)
    is_resuming = config.train.resume is not None
    check_free(folder.path, is_resuming)
    weights = [fingerprint(path) for path in weights_sources(config)]
    if checkpoint is not None and (changes := compare_with_run(config, checkpoint, weights)):
        report(changes)
    accelerator.wait_for_everyone()
    machine = {
        "device": str(accelerator.device),
        "world_size": accelerator.num_processes,
        "precision": str(accelerator.mixed_precision),
        "num_threads": torch.get_num_threads(),
        "weights": weights,
    }
    folder.create(config.to_dict(), machine, is_resuming)
    accelerator.wait_for_everyone()
    return Start(config, accelerator, folder, report, checkpoint)


def describe_start(config: Config) -> dict[str, object]:
    """Return what has to be the same on all ranks before anything is built, by name."""
    settings = {f"{group}.{name}": value for group, own in config.to_dict().items() for name, value in own.items()}
    installed = versions()
    packages = {**installed["packages"], "Python": installed["python"], "git commit": installed["git_commit"]}
    paths = [*weights_sources(config), *map(Path, listener_paths(config))]
    files = {f"weights in {path}": fingerprint(path) for path in paths}
    return {**settings, **packages, **files}


def fingerprint(path: Path, blocks: int = 64) -> str:
    """Return the size of a file, or of all files of a folder, and a hash of some blocks of each: fast on any size."""
    total, digest = 0, hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            total += size
            digest.update(f"{file.name}/{size}".encode())
            with file.open("rb") as stream:
                for block in range(blocks):
                    stream.seek(size * block // blocks)
                    digest.update(stream.read(4096))
    return f"{total:,} bytes, hash {digest.hexdigest()[:16]}"


def build(run: Start) -> Built:
    """Build the model, the same on every rank."""
    config = run.config
    run.report("Building VideoLLaVASAMModel...")
    sources = weights_sources(config)
    # Layers that are to be sharded are read into the host's memory first.
    device = "cpu" if config.train.parallel == "fsdp" else run.accelerator.device
    model, tokenizer = build_to_load(config, sources, device)
    run.report(f"✓ Model built\n{trainable_table(model)}")
    return Built(model, build_prompter(config, tokenizer), sources)


def load(run: Start, built: Built) -> Loaded:
    """Load the weights that training starts from, and write down what they were."""
    model, config = built.model, run.config
    if not built.sources:
        run.report("No pretrained weights: starting from random initialisation")
    else:
        names = {"tokenizer": built.prompter.tokenizer, "allow_missing": config.train.allow_missing}
        imported = load_weights(model, built.sources, hash_files=run.report.is_main, **names)
        run.folder.write("import_report", asdict(imported))
        run.report(f"✓ Pretrained weights loaded\n{imported}")
    # Layers are measured, and listeners compared, as they were built: neither packed nor sharded.
    memory = estimators(config, model, run.accelerator.device.type)
    listeners = {path: read_listener(path, model, built.prompter, config) for path in listener_paths(config)}
    for path in listeners:
        run.report(f"✓ Listener loaded: {path}")
    return Loaded(model, built.prompter, memory, listeners)


def open_data(run: Start) -> DataStream:
    """Open the data sets and the stream of this rank's micro-batches.

    Raises:
        ConfigError: a data set cannot be opened, or holds other entries on another rank.
    """
    stream = DataStream(run.config, run.accelerator)
    ranks.compare({f"data {share.name}": share for share in stream.sampler.stream.shares})
    return stream


def place(run: Start, loaded: Loaded) -> Placed:
    """Bring the model to its device; shard it where ranks are to share its layers."""
    model, accelerator, gathered = loaded.model, run.accelerator, None
    accelerator.wait_for_everyone()  # some read and hash longer than others, and what follows is collective
    if run.config.train.parallel == "fsdp" and accelerator.num_processes > 1:
        count = shard_language_model(accelerator, model)
        run.report(f"Sharding {count} decoder layers over {accelerator.num_processes} ranks")
        gathered = Gathered(model)
    model.to(accelerator.device)
    average = ExponentialMovingAverage(trainable_parameters(model), run.config.train.ema_decay)
    return Placed(model, loaded.prompter, loaded.memory, loaded.listeners, average, gathered)


def wire(run: Start, placed: Placed, stream: DataStream) -> Ready:
    """Put task and trainer together, and continue from a checkpoint where there is one.

    Raises:
        JudgeError: the judge does not answer, and ``reward.judge_failure`` is ``error``.
        CheckpointError: the checkpoint does not fit this run.
    """
    config, accelerator, model = run.config, run.accelerator, placed.model
    run.report(f"✓ Dataset built: {stream.num_samples} total samples\n{stream.table}")
    num_batches = stream.steps_per_epoch * config.train.gradient_accumulation_steps
    run.report(f"✓ Dataloader created: {num_batches} batches")
    judge = None
    if config.reward.judge_url is not None and config.reward.caption_weight > 0:
        judge = Judge(config.reward)
        if accelerator.is_main_process:
            judge.check()  # one question, so that a wrong address shows now
    # The task's feature cache names frozen weights, which may be no parameters any more after ``finish``.
    own = (placed.average, RankExchange(accelerator), judge, stream.num_samples, placed.listeners)
    task = DualLoopTask(model, placed.prompter, config, *own)
    for line in model.finish(accelerator.device):
        run.report(line)
    trainer = Trainer(config, task, placed.average, stream, accelerator, run.folder, run.report, placed.gathered)
    # From here on ranks draw differently (dropout); everything before had to be the same on all.
    torch.manual_seed(config.train.seed + accelerator.process_index)
    trainer.restore(run.checkpoint)
    layers = decide_by_memory(placed.memory, accelerator, trainer.optimizer)
    trainer.images_at_once = layers.images
    run.report(layers.line())
    if layers.images < config.train.batch_size:
        run.report(f"Images with a graph at a time: {layers.images} of {config.train.batch_size}")
    accelerator.wait_for_everyone()
    return Ready(trainer, layers)
