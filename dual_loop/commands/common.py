"""What the measuring commands share: ranks, progress, the data sets that ``--data`` names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dual_loop.commands.arguments import overrides_of
from dual_loop.config import DataConfig
from dual_loop.data.dataset_builder import SETTING_PREFIX, open_source
from dual_loop.data.ref_parquet import RefParquet
from dual_loop.data.refcoco import DEFAULT_SPLIT_BY, RefCoco
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation import runner
from dual_loop.evaluation.protocols import Protocol
from dual_loop.evaluation.regions import Record, RegionMeter
from dual_loop.evaluation.runner import MeasuredData
from dual_loop.serve.loading import LoadedModel, load_trained
from dual_loop.training.devices import build_accelerator, end_processes

MASKS_ONLY = tuple(name for name in SETTING_PREFIX if name != "refcoco")


@dataclass(frozen=True)
class Measured:
    """What rank 0 has in hand when every rank has measured.

    Attributes:
        folder: where results go.
        header: what was measured, with which weights and protocol.
        data: the data sets; loaded: the model.
        records: of every data set; skipped: entries that could not be read.
    """

    folder: Path
    header: dict[str, Any]
    data: list[MeasuredData]
    loaded: LoadedModel
    records: dict[str, list[Record]]
    skipped: list[dict[str, str]]

    def finish(self) -> None:
        """Remove the parts; call it when everything is written, since a second start needs them until then."""
        runner.finish(self.folder)


def measure(args: argparse.Namespace, name: str, protocol: Protocol, tasks: Sequence[str]) -> Measured | None:
    """Load the checkpoint and measure this rank's share of the data; return everything on rank 0, None elsewhere.

    Args:
        args: of :func:`add_what_is_measured` and :func:`add_model_and_data_arguments`, with ``output_dir``.
        name: of the default output folder and of the progress bar.
        protocol: how sentences are asked for.
        tasks: what is measured.

    Raises:
        DualLoopError: the checkpoint, the data or the folder cannot be used.
    """
    loaded = load_trained(
        args.checkpoint, weights=args.weights, config=args.config, overrides=overrides_of(args), device=args.device
    )
    config, folder = loaded.config, args.output_dir or default_output(args.checkpoint, name)
    data = open_measured(args.data, config.data, limit=args.max_samples, polygons=protocol.polygons)
    accelerator = build_accelerator(config)
    header = {
        "checkpoint": loaded.origin,
        "data": data_description(data),
        "tasks": list(tasks),
        "protocol": protocol.to_dict(),
        "max_new_tokens": config.loop.max_new_tokens,
    }
    runner.start(folder, header, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    loaded.model.to(accelerator.device)
    meter = RegionMeter(loaded.model, loaded.prompter, config, protocol, tasks, loaded.autocast())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    runner.measure_chunks(
        *(folder, data, meter.measure, config.train.seed, rank, world_size, progress_bar(accelerator, name))
    )
    accelerator.wait_for_everyone()
    is_main = accelerator.is_main_process
    # From here on rank 0 works alone, on files.
    end_processes(accelerator)
    if not is_main:
        return None
    records, skipped = runner.join(folder, data)
    return Measured(folder, {**header, "world_size": world_size}, data, loaded, records, skipped)


def open_measured(
    names: Sequence[str], data: DataConfig, *, limit: int | None = None, polygons: str = "union"
) -> list[MeasuredData]:
    """Open the data sets called ``names``; with none, all that the settings give (held-out set, then folders).

    Raises:
        ConfigError: a name is unknown, its folder is not given, or nothing is there.
    """
    wanted = list(names) or _all_given(data)
    if not wanted:
        raise ConfigError(explain("no data set is given", "--data", fix="give --data and the folder of that data set"))
    return [MeasuredData(name, _open(name, data, polygons), limit) for name in dict.fromkeys(wanted)]


def _all_given(data: DataConfig) -> list[str]:
    if data.eval_dir is not None:
        return [f"{name}:{data.eval_split}" for name in data.eval_datasets]
    folders = [name for name in MASKS_ONLY if getattr(data, f"{SETTING_PREFIX[name]}_dir") is not None]
    if data.refcoco_dir is not None:
        present = [n for n in data.refcoco_datasets if (Path(data.refcoco_dir) / n.partition(":")[0]).is_dir()]
        folders += [f"{name}:{data.refcoco_split}" for name in present]
    return folders


def _open(name: str, data: DataConfig, polygons: str) -> Any:
    if name.endswith(".parquet"):
        return RefParquet(name, data.refcoco_images, polygons)
    dataset, _, split = name.partition(":")
    if dataset in DEFAULT_SPLIT_BY:
        root = data.refcoco_dir or data.eval_dir
        if root is None:
            raise ConfigError(explain("the folder of a data set is not given", name, fix="set --refcoco_dir"))
        options: dict[str, Any] = {"datasets": (dataset,), "split": split or data.eval_split, "polygons": polygons}
        return RefCoco(root, images=data.refcoco_images, index_dir=data.index_dir, **options)
    if dataset not in MASKS_ONLY or split:
        expected = ", ".join((*(f"{n}:SPLIT" for n in DEFAULT_SPLIT_BY), *MASKS_ONLY, "FILE.parquet"))
        raise ConfigError(explain("unknown data set", "--data", name, expected))
    field = f"{SETTING_PREFIX[dataset]}_dir"
    if getattr(data, field) is None:
        raise ConfigError(explain("the folder of a data set is not given", name, fix=f"set --{field}"))
    return open_source(dataset, data)


def progress_bar(accelerator: Accelerator, text: str) -> Callable[[int, int], None]:
    """Return what shows progress on rank 0 and nothing elsewhere."""
    bar = tqdm(desc=text, unit="chunk", disable=not accelerator.is_main_process, file=sys.stderr)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def data_description(data: Sequence[MeasuredData]) -> list[dict[str, Any]]:
    """Return what identifies the data of an evaluation: names, sizes, first and last entries."""
    described = []
    for one in data:
        ends = [one.source.entry_id(index) for index in {0, len(one) - 1}] if len(one) else []
        described.append({"name": one.name, "entries": len(one), "ends": sorted(ends)})
    return described


def default_output(checkpoint: str | None, name: str) -> Path:
    """Return where results go by default: inside the run, else ``outputs/<name>``."""
    if checkpoint is not None and (Path(checkpoint) / "config.json").is_file():
        return Path(checkpoint) / name
    return Path("outputs") / name
