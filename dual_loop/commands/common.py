"""What the measuring commands share: ranks, progress, the data sets that ``--data`` names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dual_loop.config import Config, DataConfig
from dual_loop.data.dataset_builder import SETTING_PREFIX, build_sources
from dual_loop.data.ref_parquet import RefParquet
from dual_loop.data.refcoco import DEFAULT_SPLIT_BY, RefCoco
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.runner import MeasuredData

DATA_HELP = (
    "what to measure: refcoco:val, refcoco+:testA, refcocog:test (under --refcoco_dir or --eval_dir), "
    "sav, sa1b, openimages, masks (their folders), or a .parquet file of references"
)
MASKS_ONLY = tuple(name for name in SETTING_PREFIX if name != "refcoco")


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
    settings: dict[str, Any] = {f"{prefix}_dir": None for prefix in SETTING_PREFIX.values() if f"{prefix}_dir" != field}
    return build_sources(replace(data, **settings))[0]


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def default_output(checkpoint: str | None, name: str) -> Path:
    """Return where results go by default: inside the run, else ``outputs/<name>``."""
    if checkpoint is not None and (Path(checkpoint) / "config.json").is_file():
        return Path(checkpoint) / name
    return Path("outputs") / name


def with_regions(config: Config, count: int) -> Config:
    """Return ``config`` with so many regions of an image at most."""
    return replace(config, data=replace(config.data, regions_per_image=count))
