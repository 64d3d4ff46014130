"""Measure the indexes at release size: building, opening again, memory of a worker, Open Images, the leakage guard.

    python scripts/bench_index.py [--entries 1000000] [--real_files] [--csv_rows 2700000] [--folder DIR] [--json FILE]

Three kinds of input. ``listed``: a tree of empty files in ``--folders`` folders, 20,000 unless ``--real_files`` asks
for all (1,000,000 files take as many inodes), and the same files in one folder. ``generated``: ``--entries`` names
without files. ``csv``: an Open Images CSV. Every number comes from a process of its own, with the file cache warm. The
work folder is removed at the end.

Memory is in MiB. ``private`` pages belong to one process; ``mapped`` pages of the index file are shared by all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data import index
from dual_loop.data.index import list_tree, load_or_build
from dual_loop.data.leakage import HeldOutImage, leaked_by_id
from dual_loop.data.open_images import CSV_NAME, OpenImages
from dual_loop.data.sav import SavPairs
from dual_loop.data.shares import choose_capped
from dual_loop.data.string_table import StringTable

SMALL_TREE = 20_000
NUM_READS = 1000
IMAGES_PER_ROW = 0.35
"""Of the release: 944,037 images in 2,686,666 rows of the training CSV."""

HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
BOX = "0.102121,0.957630,0.037500,0.988333,0.86353,0.27884 0.84720 1;0.14872 0.42217 0\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=100)
    parser.add_argument("--real_files", action="store_true", help="make all --entries files, not 20,000")
    parser.add_argument("--csv_rows", type=int, default=2_700_000)
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, folder, *options = args.measure
        print(json.dumps(MEASUREMENTS[name](Path(folder), *options)))
        return 0
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench_index-", dir=args.folder))
    try:
        numbers = measure_all(folder, args)
    finally:
        shutil.rmtree(folder)
    for name, values in numbers.items():
        print(f"{name:<28}", "  ".join(f"{key} {value:,}" for key, value in values.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


def measure_all(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Make the inputs below ``folder`` and return {measurement: {quantity: number}}."""
    num_files = args.entries if args.real_files else min(args.entries, SMALL_TREE)
    numbers: dict[str, dict[str, float]] = {}
    for shape, num_folders in (("tree", args.folders), ("flat", 1)):
        write_tree(folder / shape, num_files, num_folders)
        numbers[f"listed {shape}, 1 worker"] = run("list", folder, shape, 1)
        numbers[f"listed {shape}, 2 workers"] = run("list", folder, shape, 2)
        numbers[f"listed {shape}, first start"] = run("open_pairs", folder, shape)
        numbers[f"listed {shape}, second start"] = run("open_pairs", folder, shape)
        shutil.rmtree(folder / shape)
    numbers["generated, built"] = run("generate", folder, args.entries)
    numbers["generated, opened and read"] = run("generate", folder, args.entries)
    numbers["leakage, name by name"] = run("guard", folder, args.entries, "slow")
    numbers["leakage, all at once"] = run("guard", folder, args.entries, "fast")
    write_open_images(folder / "open_images", args.csv_rows)
    numbers["csv, built"] = run("open_images", folder)
    numbers["csv, opened and read"] = run("open_images", folder)
    return numbers


def run(name: str, folder: Path, *options: object) -> dict[str, float]:
    """Return the numbers of one measurement, made in a new process."""
    command = [sys.executable, __file__, "--measure", name, str(folder), *map(str, options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


# --- inputs ----------------------------------------------------------------------------------------------------------


def entry_names(num_entries: int, num_folders: int = 1000) -> Iterator[str]:
    for number in range(num_entries):
        yield f"sav_{number % num_folders:06}/masklet_data_{number}.npz"


def write_tree(root: Path, num_files: int, num_folders: int) -> None:
    for number in range(num_folders):
        (root / f"sav_{number:06}").mkdir(parents=True)
    for name in entry_names(num_files, num_folders):
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY))


def write_open_images(root: Path, num_rows: int) -> None:
    """Write a CSV whose rows fall on images at random."""
    for name in ("images/train", "masks/train"):
        (root / name).mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, max(1, int(num_rows * IMAGES_PER_ROW)), num_rows)
    with (root / CSV_NAME).open("w", encoding="utf-8") as file:
        file.write(HEADER)
        for row, image in enumerate(images.tolist()):
            image_id, label = f"{image * 0x9E3779B97F4A7C15 % 2**64:016x}", f"0{row % 350:04}"
            file.write(f"{image_id}_m{label}_{row:08x}.png,{image_id},/m/{label},{row:08x},{BOX}")


# --- measurements, each in a process of its own ----------------------------------------------------------------------


def memory() -> dict[str, float]:
    """Return the resident memory of this process in MiB: ``private``, ``mapped`` from files, and the ``peak`` (Linux).

    The peak of ``getrusage`` would not do: a new process takes over that of the one that started it.
    """
    text = Path("/proc/self/status").read_text(encoding="ascii")
    kinds = {"private": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {kind: int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 1024 for kind, name in kinds.items()}  # type: ignore[index]


def measured(work: Callable[[], Callable[[], int]]) -> dict[str, float]:
    """Return seconds of ``work``, growth of memory over it and what it returns, which counts the entries."""
    before, started = memory(), time.perf_counter()
    finish = work()
    seconds = time.perf_counter() - started
    num_entries = finish()
    after = memory()
    grown = {f"{kind}_growth": round(after[kind] - before[kind], 1) for kind in ("private", "mapped")}
    return {"seconds": round(seconds, 3), "entries": num_entries, **grown, "peak": round(after["peak"], 1)}


def read_some(length: int, read: Callable[[int], str]) -> int:
    for number in np.random.default_rng(0).integers(0, length, NUM_READS).tolist():
        assert read(number)
    return length


def measure_listing(folder: Path, shape: str, workers: str) -> dict[str, float]:
    index.PATIENCE, index.default_workers = 0.0, lambda: int(workers)

    def work() -> Callable[[], int]:
        files, _ = list_tree(folder / shape, (".npz",), folder / f"parts{shape}{workers}", {})
        return lambda: len(files)

    return measured(work)


def measure_pairs(folder: Path, shape: str) -> dict[str, float]:
    def work() -> Callable[[], int]:
        source = SavPairs(folder / shape, index_dir=folder / "index")
        return lambda: read_some(len(source), source.entry_id)

    return measured(work)


def open_generated(folder: Path, num_entries: int) -> StringTable:
    arrays = load_or_build(
        folder / "index",
        {"kind": "generated"},
        lambda: StringTable.from_strings(entry_names(num_entries)).to_arrays("path"),
    )
    return StringTable.from_arrays(arrays, "path")


def measure_generated(folder: Path, num_entries: str) -> dict[str, float]:
    def work() -> Callable[[], int]:
        table = open_generated(folder, int(num_entries))
        kept = choose_capped(len(table), None, "cap")
        return lambda: read_some(len(table), lambda index: table[int(kept[index])])

    return measured(work)


class Names:
    """A source of names, asked one by one; :class:`SearchableNames` can be searched as a whole."""

    name = "generated"

    def __init__(self, table: StringTable) -> None:
        self.table, self.kept = table, np.arange(len(table))

    def __len__(self) -> int:
        return len(self.kept)

    def entry_id(self, index: int) -> str:
        return self.table[int(self.kept[index])]

    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        return [], self.kept


class SearchableNames(Names):
    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        return [self.table], self.kept


def measure_guard(folder: Path, num_entries: str, how: str) -> dict[str, float]:
    source: Any = (Names if how == "slow" else SearchableNames)(open_generated(folder, int(num_entries)))
    held_out = {number: HeldOutImage(number, "val", None) for number in range(0, 50_000, 5)}

    def work() -> Callable[[], int]:
        assert leaked_by_id(source, held_out) == []
        return lambda: len(source)

    return measured(work)


def measure_open_images(folder: Path) -> dict[str, float]:
    def work() -> Callable[[], int]:
        source = OpenImages(folder / "open_images", index_dir=folder / "index")
        return lambda: read_some(len(source), source.entry_id)

    return measured(work)


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "list": measure_listing,
    "open_pairs": measure_pairs,
    "generate": measure_generated,
    "guard": measure_guard,
    "open_images": measure_open_images,
}

if __name__ == "__main__":
    sys.exit(main())
