"""Self-training in two stages: which labels of a mask set teach a captioner something?

    python scripts/experiments/self_training.py OUT [--arms captioned greedy ...] [--seeds 31 32] [--steps 300]

Stage 1: the packaged tiny checkpoint captions the masks of 300 scenes (dual-loop audit --labels). Stage 2: from that
checkpoint, 60 captioned scenes and the labels are trained on. The true captions of the 300 scenes only count which
labels are right. The listener is that of caption_filter.py, trained apart on 600 scenes. Seeds: data and training.
What is done is not done again. Writes OUT/self_training.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from dual_loop.caption_metrics import caption_exact  # noqa: E402
from dual_loop.testing.demo_data import write_demo_data  # noqa: E402
from experiments.caption_filter import train_listener  # noqa: E402

ALL = ("--min_iou", "0", "--min_uniqueness", "-1", "--keep_repeated")
STAGE_1: dict[str, tuple[str, ...] | None] = {
    "captioned": None,
    "greedy": ALL,
    "cycle IoU": ("--min_iou", "0.7", "--min_uniqueness", "0.1", "--keep_repeated"),
    "trusted": (*ALL, "--likelihood_floor", "0.95"),
    "best of 8": (*ALL, "--best_of", "8"),
    "true": (),
}
"""Flags of the audit that writes an arm's labels; none for the captioned scenes alone and for true captions."""


def run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def labels_of(folder: Path, data: Path, listener: Path, flags: Sequence[str]) -> dict[str, int]:
    """Write the labels of one arm, and count what was kept, how much of it is right, and what choosing changed."""
    out = folder / "labels"
    if not (folder / "audit" / "audit.json").is_file():
        about = ["--data", "refcoco:train", "--refcoco_dir", data, "--labels", out, "--output_dir", folder / "audit"]
        options = ["--cfg-options", "train.num_threads=1", "loop.max_new_tokens=12"]
        run("dual_loop.cli", "audit", *about, "--device", "cpu", "--listener", listener, *flags, *options)
    regions = [json.loads(line) for line in (folder / "audit" / "regions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    kept = {f"{Path(row['image']).stem}#{row['id']}" for row in rows}
    before = [caption_exact(one.get("greedy", one["caption"]), one["references"]) for one in regions]
    after = [caption_exact(one["caption"], one["references"]) for one in regions]
    is_kept = [one["name"].split("/")[-1] in kept for one in regions]
    return {
        "regions": len(regions),
        "kept": sum(is_kept),
        "kept_right": sum(right for right, own in zip(after, is_kept, strict=True) if own),
        "right_to_wrong": sum(a and not b for a, b in zip(before, after, strict=True)),
        "wrong_to_right": sum(b and not a for a, b in zip(before, after, strict=True)),
    }


def train(folder: Path, few: Path, labels: Sequence[object], seed: int, steps: int) -> dict[str, float]:
    """Train one arm and return what its captions and masks are worth on held-out scenes."""
    if not (folder / "summary.json").is_file():
        shares = {"refcoco": 0.25, "masks": 0.75} if labels else {}
        sources = ("sav", "sa1b", "openimage", "refcoco", "masks")
        options = [f"data.{name}_weight={shares.get(name)}" for name in sources]
        run(
            *("dual_loop.train_dual_loop", "--config", ROOT / "configs" / "tiny_demo.py", "--device", "cpu"),
            *("--max_steps", steps, "--seed", seed, "--refcoco_dir", few, "--eval_dir", few, *labels),
            *("--output_dir", folder, "--resume", "auto", "--panel_interval", 100000),
            *("--cfg-options", "train.num_threads=1", "data.refcoco_datasets=refcoco", *options),
        )
    summary = json.loads((folder / "summary.json").read_text())
    names = ("caption_exact", "gIoU", "cycle_gIoU_frozen")
    return {**{name: summary["after"][name] for name in names}, "start": summary["before"]["caption_exact"]}


def main() -> None:
    """Run the arms of every seed and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=list(STAGE_1), default=list(STAGE_1), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    listener, result = train_listener(args.out, "apart"), {}
    for seed in args.seeds:
        place = args.out / f"seed{seed}"
        write_demo_data(place / "few", 60, seed, sources=("refcoco",), num_val=200)
        write_demo_data(place / "masks", 300, seed + 1000, sources=("refcoco",), num_val=1)
        few, masks = (place / name / "ref_seg" for name in ("few", "masks"))
        for arm in args.arms:
            folder, flags = place / arm.replace(" ", "_"), STAGE_1[arm]
            found: dict[str, float] = {}
            labels: list[object] = []
            if flags:
                found |= labels_of(folder, masks, listener, flags)
                labels = ["--masks_dir", folder / "labels"]
            elif flags is not None:
                labels = ["--masks_dir", true_labels(folder, masks, listener)]
            result.setdefault(arm, {})[seed] = found | train(folder / "run", few, labels, seed, args.steps)
            print(arm, seed, result[arm][seed], flush=True)
    document = {"steps": args.steps, "arms": result}
    (args.out / "self_training.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def true_labels(folder: Path, masks: Path, listener: Path) -> Path:
    """Return labels of all regions with their true captions in place of the model's."""
    labels_of(folder, masks, listener, ALL)
    regions = [json.loads(line) for line in (folder / "audit" / "regions.jsonl").read_text().splitlines()]
    truth = {one["name"].split("/")[-1]: one["references"][0] for one in regions}
    path = folder / "labels" / "labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["caption"] = truth[f"{Path(row['image']).stem}#{row['id']}"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "labels"


if __name__ == "__main__":
    main()
