"""Captions that led back to their mask, written as a captioned data set that training reads (``--masks_dir``).

::

    OUT/labels.jsonl        one object a line: image, segmentation (RLE), caption, id, iou, uniqueness, data, trust
        labels.parquet      the same as a table, where pyarrow is installed
        images/<data>/...   links to the images (or copies); frames of SA-V pairs are written as PNG

A pseudo-label confirms the model that made it. The thresholds keep what that model can tell apart; look at the page of
the audit, and at a random sample of what was kept, before training on it. Which captions are right is told better by
how likely they are, most of all to a model that was trained apart, than by their masks (docs/experiments.md).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from dual_loop.caption_metrics import normalise_caption
from dual_loop.data.coco_masks import encode_rle
from dual_loop.evaluation.measure import MeasuredRegion
from dual_loop.evaluation.runner import MeasuredData

LABELS, TABLE, IMAGES = "labels.jsonl", "labels.parquet", "images"


def choose_labels(
    regions: Sequence[MeasuredRegion],
    gate: Callable[[str], str | None],
    *,
    min_iou: float = 0.7,
    min_uniqueness: float = 0.1,
    min_trust: float = 0.0,
    keep_repeated: bool = False,
) -> tuple[list[MeasuredRegion], Counter[str]]:
    """Return the regions that are kept, and how many were left out by reason (the first that applies).

    Args:
        gate: says why a caption may not be used (``loop.gates``), None where it may.
        min_uniqueness: least cycle IoU minus the best IoU with another region; regions without company pass.
        min_trust: least ``MeasuredRegion.trust``, where it was asked.
        keep_repeated: keep captions that two regions of one image share (they do not tell them apart).
    """
    captions = [(region.image, normalise_caption(region.caption)) for region in regions]
    counts = Counter(captions)
    kept, left_out = [], Counter[str]()
    for region, caption in zip(regions, captions, strict=True):
        reason = region.rejected or gate(region.caption)
        if reason is None and region.cycle_iou < min_iou:
            reason = "low_iou"
        if reason is None and region.uniqueness is not None and region.uniqueness < min_uniqueness:
            reason = "ambiguous"
        if reason is None and region.trust is not None and region.trust < min_trust:
            reason = "unlikely"
        if reason is None and counts[caption] > 1 and not keep_repeated:
            reason = "same_caption_twice"
        if reason is None:
            kept.append(region)
        else:
            left_out[reason] += 1
    return kept, left_out


def write_labels(
    out: Path, data: Sequence[MeasuredData], kept: Mapping[str, Sequence[MeasuredRegion]], seed: int, copy_images: bool
) -> int:
    """Write the kept regions of every data set below ``out``, new or empty; return their number.

    ``kept`` has the regions by the name of their data set; ``seed`` is of the audit, which drew them.
    """
    rows: list[dict[str, object]] = []
    out.mkdir(parents=True, exist_ok=True)
    for one in data:
        by_entry: dict[int, list[MeasuredRegion]] = {}
        for region in kept.get(one.name, ()):
            by_entry.setdefault(region.entry, []).append(region)
        for entry, regions in sorted(by_entry.items()):
            path = one.source.image_path(entry)
            folder = one.name.replace(":", "_").replace("/", "_")
            name = f"{IMAGES}/{folder}/{one.source.entry_id(entry)}{'.png' if path is None else path.suffix}"
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            masks = [region.target for region in regions]
            if path is None:
                # The caption describes the first frame of a pair, which is a file nowhere.
                sample = one.load(entry, seed)
                Image.fromarray(sample.image).save(target)
                masks = [encode_rle(sample.masks[region.own]) for region in regions]
            elif copy_images:
                shutil.copyfile(path, target)
            else:
                os.symlink(path.resolve(), target)
            rows += [
                {
                    "image": name,
                    "segmentation": mask,
                    "caption": region.caption,
                    "id": region.name.split("#")[-1],
                    "iou": round(region.cycle_iou, 4),
                    "uniqueness": region.uniqueness,
                    "data": one.name,
                    **({} if region.trust is None else {"trust": round(region.trust, 4)}),
                }
                for region, mask in zip(regions, masks, strict=True)
            ]
    with (out / LABELS).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        flat = [{**row, "segmentation": json.dumps(row["segmentation"])} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(flat), out / TABLE)
    return len(rows)
