"""Captions that led back to their mask, written as a captioned data set that training reads (``--masks_dir``).

::

    OUT/labels.jsonl        one object a line: image, segmentation (RLE), caption, id, iou, uniqueness, data
        labels.parquet      the same as a table, where pyarrow is installed
        images/<data>/...   links to the images (or copies); frames of SA-V pairs are written as PNG

A pseudo-label confirms the model that made it. The thresholds keep what that model can tell apart; look at the page of
the audit, and at a random sample of what was kept, before training on it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dual_loop.data.masks import encode_rle
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.regions import Record, cycle_iou, uniqueness
from dual_loop.evaluation.runner import MeasuredData
from dual_loop.metrics import normalise_caption
from dual_loop.types import RegionSample

LABELS, TABLE, IMAGES = "labels.jsonl", "labels.parquet", "images"


@dataclass(frozen=True)
class Thresholds:
    """What a caption must reach to be kept.

    Attributes:
        min_iou: cycle IoU.
        min_uniqueness: cycle IoU minus the best IoU with another region; regions without company pass.
        keep_repeated: keep captions that two regions of one image share (they do not tell them apart).
    """

    min_iou: float = 0.7
    min_uniqueness: float = 0.1
    keep_repeated: bool = False


def choose_labels(
    records: Sequence[Record], thresholds: Thresholds, gate: Callable[[str], str | None]
) -> tuple[list[Record], dict[str, int]]:
    """Return the records that are kept, and how many were left out by reason (the first that applies).

    Args:
        records: with captions and cycles.
        thresholds: see :class:`Thresholds`.
        gate: says why a caption may not be used (``loop.gates``), None where it may.
    """
    texts = Counter((record["image"], normalise_caption(record["caption"])) for record in records)
    kept, left_out = [], Counter[str]()
    for record in records:
        reason = _reason(record, thresholds, gate)
        if reason is None and not thresholds.keep_repeated:
            shared = texts[record["image"], normalise_caption(record["caption"])]
            reason = "same_caption_twice" if shared > 1 else None
        if reason is None:
            kept.append(record)
        else:
            left_out[reason] += 1
    return kept, dict(sorted(left_out.items()))


def _reason(record: Record, thresholds: Thresholds, gate: Callable[[str], str | None]) -> str | None:
    if record["rejected"] is not None:
        return str(record["rejected"])
    gated = gate(record["caption"])
    if gated is not None:
        return gated
    if cycle_iou(record) < thresholds.min_iou:
        return "low_iou"
    margin = uniqueness(record)
    return "ambiguous" if margin is not None and margin < thresholds.min_uniqueness else None


def write_labels(
    out: Path, data: Sequence[MeasuredData], kept: Mapping[str, Sequence[Record]], seed: int, copy_images: bool
) -> int:
    """Write the kept records of every data set below ``out``; return their number.

    Args:
        out: a new or empty folder.
        data: where the records come from.
        kept: records by the name of their data set.
        seed: of the audit, which drew the regions.
        copy_images: copy the images instead of linking to them.

    Raises:
        ConfigError: ``out`` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(explain("the folder of pseudo-labels is not empty", str(out), fix="choose another --labels"))
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for one in data:
        by_entry: dict[int, list[Record]] = {}
        for record in kept.get(one.name, ()):
            by_entry.setdefault(record["entry"], []).append(record)
        for entry, own in sorted(by_entry.items()):
            rows += _entry_rows(out, one, entry, own, seed, copy_images)
    with (out / LABELS).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_table(out / TABLE, rows)
    return len(rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Write the rows as parquet; return False where pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        return False
    flat = [{**row, "segmentation": json.dumps(row["segmentation"])} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(flat), path)
    return True


def _entry_rows(
    out: Path, data: MeasuredData, entry: int, records: Sequence[Record], seed: int, copy_images: bool
) -> list[dict[str, Any]]:
    path = data.source.image_path(entry)
    folder = data.name.replace(":", "_").replace("/", "_")
    name = f"{IMAGES}/{folder}/{data.source.entry_id(entry)}"
    sample: RegionSample | None = None
    if path is None:
        # The caption describes the first frame of a pair, which is a file nowhere.
        sample = data.load(entry, seed)
        name += ".png"
        _new_file(out / name)
        Image.fromarray(sample.image).save(out / name)
    else:
        name += path.suffix
        target = _new_file(out / name)
        if copy_images:
            shutil.copyfile(path, target)
        else:
            os.symlink(path.resolve(), target)
    rows = []
    for record in records:
        mask = record["target"] if sample is None else encode_rle(sample.masks[record["own"]])
        iou = cycle_iou(record)
        row = {"image": name, "segmentation": mask, "caption": record["caption"], "id": record["name"].split("#")[-1]}
        rows.append({**row, "iou": round(iou, 4), "uniqueness": uniqueness(record), "data": data.name})
    return rows


def _new_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
