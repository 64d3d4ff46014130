"""Run the trainings behind the tables of ``docs/experiments.md``, and print the tables.

    python scripts/experiments/evidence.py WORK [--tables core rewards ...] [--seeds 0 1] [--jobs 2]
    python scripts/experiments/evidence.py --print > docs/experiments/tables.md

A run that is done leaves ``docs/experiments/evidence/TABLE/ARM_sSEED.json``: what was run, at which commit, its
figures, and the numbers of every held-out region. What lies there is not run again, and what was stopped goes on from
its checkpoint, so the command may be stopped and started at will, over days and machines.

All runs of a seed share their data: scenes with masks, 300 captioned scenes of which the first are taken, from pools of
that seed. The held-out scenes are the same for all seeds, so intervals are crossed: seeds and images are both drawn.
Most held-out objects share their shape or their colour with a neighbour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dual_loop.data.coco_masks import encode_rle  # noqa: E402
from dual_loop.data.masks import decode_rle  # noqa: E402
from dual_loop.metrics import iou, mask_overlap  # noqa: E402
from dual_loop.testing.demo_data import write_demo_data  # noqa: E402
from dual_loop.testing.scenes import generate_scene, pool_seed  # noqa: E402
from experiments import composition  # noqa: E402
from experiments.crossed import markdown  # noqa: E402
from experiments.plans import CAPTIONS, TABLES, Run, runs_of  # noqa: E402

RESULTS = ROOT / "docs" / "experiments" / "evidence"
SCENES, CAPTIONED, START_SCENES = 1800, 300, 300
HELD_OUT, TUNING = ("held_out", 1000, 200), ("tuning", 2000, 100)
"""Folder, seed and number of scenes that figures come from."""
EXPRESSIONS, EXPRESSION_SCENES = "expressions/masks.jsonl", 800
"""Expressions of other kinds: their file below the data, and of how many scenes they are taken."""


# ---- data ------------------------------------------------------------------------------------------------------------


def write_scenes(work: Path, seed: int, vague: float) -> Path:
    """Write the data of one seed: masks without text, captioned scenes."""
    folder = work / "data" / (f"s{seed}_vague" if vague else f"s{seed}")
    write_demo_data(
        folder, SCENES, seed, sources=("sa1b", "refcoco"), num_refcoco=CAPTIONED, num_val=1, vague_share=vague
    )
    return folder


def write_lines(path: Path, images: str, pool: str, seed: int, captions: Sequence[str | None]) -> None:
    """Write the objects of scenes of a pool as lines of JSON, with one caption an object, as far as these go."""
    given, temporary = iter(captions), path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for index in range(len(captions)):
            for number, item in enumerate(generate_scene(pool_seed(seed, pool, index)).objects):
                try:
                    caption = next(given)
                except StopIteration:
                    temporary.replace(path)
                    return
                line = {"image": images.format(index + 1), "id": str(number), "segmentation": encode_rle(item.mask)}
                stream.write(json.dumps(line if caption is None else {**line, "caption": caption}) + "\n")
    raise AssertionError("a scene has at least one object")


def objects_of(pool: str, seed: int, scenes: int) -> list[str]:
    """Return the true captions of all objects of a pool's scenes."""
    return [text for index in range(scenes) for text in generate_scene(pool_seed(seed, pool, index)).captions]


def start_captions(folder: Path) -> list[str]:
    """Return what the starting weights write of every object of the scenes with masks."""
    import torch

    from dual_loop.config import load_config, resolve_config_path
    from dual_loop.evaluation.measure import RegionMeter
    from dual_loop.serve.loading import find_trained

    torch.set_num_threads(1)
    loaded = find_trained(None, config=str(resolve_config_path("tiny_cpu"))).load(torch.device("cpu"))
    from tiny.scenes import scene_sample

    seed = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["seed"]
    samples = (scene_sample(generate_scene(pool_seed(seed, "sa1b", index)), str(index)) for index in range(SCENES))
    config = load_config(resolve_config_path("tiny_demo"))
    regions = RegionMeter(loaded.model, loaded.prompter, config, tasks=["captioning"]).measure(samples, "masks")
    return ["the object" if region.rejected else region.caption for region in regions]


def write_masks(folder: Path, kind: str) -> Path:
    """Write the scenes with masks, with captions of a kind of :data:`CAPTIONS`."""
    path = folder / f"masks_{kind}.jsonl"
    if path.is_file():
        return path
    seed = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["seed"]
    captions: list[Any] = objects_of("sa1b", seed, SCENES)
    if kind == "written":
        captions = [None] * len(captions)
    elif kind == "constant":
        captions = ["the object"] * len(captions)
    elif kind == "shuffled":
        captions = [captions[place] for place in np.random.default_rng(seed).permutation(len(captions))]
    elif kind == "start":
        captions = start_captions(folder)
    write_lines(path, "sa1b/sa_{}.jpg", "sa1b", seed, captions)
    return path


def write_start_scenes(work: Path) -> None:
    """Write the captioned scenes that the packaged checkpoint was made of (``scripts/pretrain_tiny.py``)."""
    path = work / "data" / "start" / "masks.jsonl"
    composition.write_objects(path, "images/{}.jpg", "tiny/captioned", 0, START_SCENES, composition.true)


def write_held_out(work: Path) -> None:
    for name, seed, scenes in (HELD_OUT, TUNING):
        write_demo_data(work / "data" / name, 1, seed, sources=("refcoco",), num_refcoco=1, num_val=scenes)


# ---- runs ------------------------------------------------------------------------------------------------------------


def training_arguments(run: Run, work: Path) -> list[str]:
    """Return the trainer's arguments of one run; its data has to be written."""
    folder = work / "data" / (f"s{run.seed}_vague" if run.vague else f"s{run.seed}")
    flags = [part.replace("{listener}", str(work / "runs" / "listener" / "true_s77")) for part in run.flags]
    settings = ["train.num_threads=1", *run.settings, "data.refcoco_repeats=1", "data.sa1b_repeats=1"]
    # Whose captions people gave, and who has masks alone or captions of another kind.
    captioned = {"masks" if run.without_pairs else "refcoco": run.captioned}
    masks = "sa1b" if run.without_pairs or run.everything else "masks"
    places = {"refcoco": folder / "ref_seg", "sa1b": folder / "sa1b", "masks": folder / f"masks_{run.captions}.jsonl"}
    if run.without_pairs:
        places["masks"] = folder / "named.jsonl"
        settings.append(f"train.pretrained_pth={work / 'start_without_pairs'}")
    elif run.everything:
        places["masks"] = work / "data" / "start" / "masks.jsonl"
        captioned["masks"] = START_SCENES
    samples, weights = captioned, dict.fromkeys(("sav", "sa1b", "openimage", "refcoco", "masks"))
    if run.captions != "none":
        samples = {**captioned, masks: run.scenes}
        total = sum(captioned.values())
        weights |= {name: 0.25 * number / total for name, number in captioned.items()} | {masks: 0.75}
    settings += [f"data.{name}_weight={value}" for name, value in weights.items()]
    settings += [f"data.{name}_max_samples={value}" for name, value in samples.items()]
    options = {"refcoco": "--refcoco_dir", "sa1b": "--sa1b_dir", "masks": "--masks_dir"}
    sources = [part for name in samples for part in (options[name], places[name])]
    if run.stops_early:
        settings += ["train.save_interval=75", "train.keep_checkpoints=100"]
    return [
        *("--config", str(ROOT / "configs" / "tiny_demo.py"), "--device", "cpu", "--max_steps", str(run.steps)),
        *("--learning_rate", str(run.rate), "--seed", str(run.seed), "--resume", "auto", "--panel_interval", "100000"),
        *map(str, [*sources, "--output_dir", work / "runs" / run.name]),
        *(*flags, "--cfg-options", *settings),
    ]


def call(*arguments: object) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def evaluate(checkpoint: object, work: Path, data: str, out: Path, *further: object) -> list[str]:
    place = work / "data" / data
    if place.suffix:
        where: tuple[object, ...] = ("--data", "masks", "--masks_dir", place)
    else:
        where = ("--data", "refcoco:val", "--eval_dir", place / "ref_seg", "--refcoco_dir", place / "ref_seg")
    return call("dual_loop.cli", "evaluate", checkpoint, *where, "--output_dir", out, "--device", "cpu", *further)


def do(run: Run, work: Path) -> None:
    """Train, measure, and write the result of one run; everything that it prints goes to its log."""
    folder, started = work / "runs" / run.name, time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with Path(f"{folder}.log").open("ab") as log:

        def start(command: list[str]) -> None:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)

        if run.steps:
            start(call("dual_loop.train_dual_loop", *training_arguments(run, work)))
        measured = folder if run.steps else work / "start_without_pairs"
        chosen: dict[str, float] = {}
        if run.stops_early:
            for path in sorted((folder / "checkpoints").glob("step_*")):
                out = folder / "tuning" / path.name
                if not (out / "evaluation.json").is_file():
                    start(evaluate(path, work, TUNING[0], out, "--tasks", "referring"))
                chosen[path.name] = read_figures(out)["referring"]["gIoU"]["value"]
            measured = folder / "checkpoints" / max(chosen, key=chosen.__getitem__)
        data = TUNING[0] if run.table == "tuning" else HELD_OUT[0]
        listener = work / "runs" / "listener" / "true_s77"
        heard: list[object] = ["--listener", listener] if run.table in ("rewards", "codes") else []
        if run.without_pairs:
            heard += ["--tasks", "referring", "captioning", "loop", "no_target"]
        out = folder / "measured"
        if not (out / "evaluation.json").is_file():
            shutil.rmtree(out, ignore_errors=True)
            start(evaluate(measured, work, data, out, *heard))
        if run.without_pairs and not (out / "expressions" / "evaluation.json").is_file():
            start(evaluate(measured, work, EXPRESSIONS, out / "expressions", "--tasks", "referring"))
    counters = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["counters"] if run.steps else {}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    write_result(
        {
            **{key: value for key, value in asdict(run).items() if value is not False and value != ()},
            "commit": head.stdout.strip(),
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread",
            "seconds": round(time.time() - started),
            **({"tuned": chosen, "measured": measured.name} if chosen else {}),
            "counters": {key: value for key, value in counters.items() if value},
            **condense(out),
            **(composed(out) if run.without_pairs else {}),
        },
        run.name,
    )
    if run.table != "listener":
        shutil.rmtree(folder)


def read_figures(out: Path) -> dict[str, Any]:
    figures = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["figures"]
    return dict(figures["refcoco:val"])


def read_regions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "regions.jsonl").read_text(encoding="utf-8").splitlines()]


def composed(out: Path) -> dict[str, Any]:
    """Return the numbers of regions by what an expression asks for, and how many expressions of nothing got a mask."""
    regions, further = read_regions(out), read_regions(out / "expressions")
    columns, asked = columns_of(regions), columns_of(further)
    is_unnamed = [composition.names_unnamed_pair(region["references"][0]) for region in regions]
    kinds = [region["name"].rsplit("#", 1)[1].split("/")[0] for region in further if region["sentences"]]
    groups = {
        "named pairs": split_columns(columns, [not unnamed for unnamed in is_unnamed]),
        "unnamed pairs": split_columns(columns, is_unnamed),
        **{kind: split_columns(asked, [own == kind for own in kinds]) for kind in sorted(set(kinds))},
    }
    empty = [int(region["no_target"]["union"] == 0) for region in regions if "no_target" in region]
    return {"no_target_is_empty": [sum(empty), len(empty)], "groups": groups}


def split_columns(columns: dict[str, list[int]], is_kept: list[bool]) -> dict[str, list[int]]:
    return {
        name: [value for value, kept in zip(values, is_kept, strict=True) if kept] for name, values in columns.items()
    }


def condense(out: Path) -> dict[str, Any]:
    """Return figures, and the numbers of every held-out region."""
    columns = columns_of(read_regions(out))
    figures = {name: round(float(np.mean(values)), 4) for name, values in columns.items() if name != "image"}
    return {"figures": figures, "regions": columns}


def columns_of(regions: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return image, IoU in per mille and whether the mask picks it, of every region with an expression, in order."""
    by_image: dict[str, list[np.ndarray]] = {}
    for region in regions:
        by_image.setdefault(region["image"], []).append(decode_rle(region["target"], region["name"]))
    images = list(by_image)
    regions = [region for region in regions if region["sentences"]]
    columns: dict[str, list[int]] = {"image": [images.index(region["image"]) for region in regions]}
    ious, picks = [], []
    for region in regions:
        targets = np.stack(by_image[region["image"]])
        mask = decode_rle(region["sentences"][0]["mask"], region["name"])
        overlaps = iou(*mask_overlap(np.broadcast_to(mask, targets.shape), targets))
        own = overlaps[region.get("own", 0)]
        ious.append(round(1000 * float(own)))
        picks.append(int(own == overlaps.max() > 0))
    columns |= {"iou": ious, "picks": picks}
    for name in ("cycle", "independent"):
        if all(name in region for region in regions):
            columns[name] = [
                round(1000 * float(iou(region[name]["intersection"], region[name]["union"]))) for region in regions
            ]
    if all("caption" in region for region in regions):
        columns["exact"] = [int(region["caption"] in region["references"]) for region in regions]
    return columns


def write_result(result: dict[str, Any], name: str) -> None:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    temporary.replace(path)


def do_start(work: Path) -> None:
    """Measure the starting weights themselves."""
    out = work / "runs" / "start"
    if not (out / "evaluation.json").is_file():
        command = evaluate("", work, HELD_OUT[0], out)
        command.remove("")
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    write_result(condense(out), "start")


def tables(names: Sequence[str]) -> str:
    """Return a page of what the results say."""
    head = """# Tables of the evidence

Written by `python scripts/experiments/evidence.py --print`; what they say stands in
[experiments.md](../experiments.md). Per cent, 200 held-out scenes (tuning: 100 others),
means over seeds; in brackets 95 % intervals over data seeds and images."""
    return f"{head}\n\n{markdown(RESULTS, names)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder of data and runs")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--arms", nargs="+", help="these arms alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--print", action="store_true", help="run nothing, print the tables of what is there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = [run for run in runs_of(args.tables) if args.seeds is None or run.seed in args.seeds]
    wanted = [run for run in wanted if args.arms is None or run.arm in args.arms]
    if args.print:
        print(tables(args.tables))
        return 0
    if args.work is None:
        parser.error("where are the runs to go? give WORK")
    work = args.work.resolve()
    if args.run:
        do(next(run for run in wanted if run.name == args.run), work)
        return 0
    write_held_out(work)
    if any(run.without_pairs for run in wanted):
        composition.write_start(work)
        place = work / "data" / EXPRESSIONS
        composition.write_objects(
            place, "images/{}.jpg", "expressions", HELD_OUT[1], EXPRESSION_SCENES, composition.asked
        )
    if not (RESULTS / "start.json").is_file():
        do_start(work)
    return run_all([run for run in wanted if not is_done(run, work)], work, args.jobs)


def is_done(run: Run, work: Path) -> bool:
    """Return whether a run has left its result; other runs need the listener's weights too."""
    has_weights = run.table != "listener" or (work / "runs" / run.name / "summary.json").is_file()
    return has_weights and (RESULTS / f"{run.name}.json").is_file()


def run_all(waiting: list[Run], work: Path, jobs: int) -> int:
    """Start what is not done yet, ``jobs`` at a time; a run's data is written before it starts."""
    running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    failed = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop(0)
            folder = write_scenes(work, run.seed, run.vague)
            if run.without_pairs:
                composition.write_objects(
                    *(folder / "named.jsonl", "ref_seg/refcoco/coco2014/train2014/COCO_train2014_{:012d}.jpg"),
                    *("refcoco/train", run.seed, CAPTIONED, composition.named),
                )
            elif run.captions != "none":
                write_masks(folder, run.captions)
            if run.everything:
                write_start_scenes(work)
            command = [sys.executable, __file__, str(work), "--tables", run.table, "--run", run.name]
            running[subprocess.Popen(command)] = (run, time.time())
        time.sleep(1.0)
        for process in [process for process in running if process.poll() is not None]:
            run, started = running.pop(process)
            failed += process.returncode != 0
            state = "done" if process.returncode == 0 else f"FAILED, see {work / 'runs' / run.name}.log"
            print(f"{run.name}: {state}, {time.time() - started:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    assert set(CAPTIONS) >= {run.captions for run in runs_of(list(TABLES))}
    sys.exit(main())
