"""Which scores tell right captions from wrong ones, and what choosing the best of several samples does to captions.

    python scripts/experiments/caption_filter.py OUT [--scenes 200] [--seeds 21 22] [--samples 8]

The packaged tiny checkpoint captions the regions of generated scenes, whose true captions are known: a caption is right
where it equals the true one. Two listeners are trained from that checkpoint on captioned scenes of their own, unless
OUT holds them: "apart" on 600 scenes, which make it a better captioner, and "few" on 60, which hardly do.

Writes OUT/caption_filter.json: for every score the area under the curve with its 95 % interval (bootstrap over images),
and how many right captions became wrong and wrong ones right by every rule of choosing the best of the samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dual_loop.caption_metrics import caption_exact, normalise_caption
from dual_loop.data.prepare import batch_from_samples
from dual_loop.evaluation.measure import BestOf
from dual_loop.iteration import in_chunks
from dual_loop.loop.captioner import Captioner, measuring_settings
from dual_loop.loop.scorer import Scorer
from dual_loop.loop.spoken import log_likelihoods, trust
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import geometry
from dual_loop.model.stored_weights import StoredWeights, weights
from dual_loop.serve.loading import LoadedModel, find_trained
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.testing.scenes import generate_scene, pool_seed
from dual_loop.training.listeners import read_listener
from dual_loop.types import RegionSample, WrittenCaption

ROOT = Path(__file__).resolve().parents[2]
LISTENERS = {"apart": (600, 77, 450, 5), "few": (60, 78, 200, 6)}
"""Scenes, their seed, optimiser steps, seed of the training."""
MARGINS, FLOORS = (0.0, 0.1, 0.3), (0.0, 0.6)
RESAMPLES = 1000


@dataclass
class Region:
    """What was asked of one region; each list holds the greedy caption first, then the samples.

    Attributes:
        ious: by model (``own`` or a listener), for each caption the IoU with its region and the best with another.
        likelihoods: by model, the mean log-likelihood of a token. said: by model, its own greedy caption.
        others: the greedy caption's likelihood for the other regions of the image, by the captioner.
    """

    image: str
    truth: str
    written: list[WrittenCaption]
    ious: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    likelihoods: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)

    def is_right(self, number: int = 0) -> bool:
        return caption_exact(self.written[number].text, [self.truth])


def train_listener(out: Path, name: str) -> Path:
    """Train a listener below ``out`` through the trainer's own entry, unless it is there."""
    scenes, data_seed, steps, seed = LISTENERS[name]
    data, run = out / f"{name}_data", out / name
    if not (run / "summary.json").is_file():
        write_demo_data(data, scenes, data_seed, sources=("refcoco",), num_val=1)
        options = [f"data.{source}_weight=None" for source in ("sav", "sa1b", "openimage", "refcoco")]
        places = ("--refcoco_dir", str(data / "ref_seg"), "--output_dir", str(run), "--resume", "auto")
        command = [
            *(sys.executable, "-m", "dual_loop.train_dual_loop", "--config", str(ROOT / "configs" / "tiny_demo.py")),
            *("--device", "cpu", "--max_steps", str(steps), "--seed", str(seed), *places),
            *("--panel_interval", "100000", "--cfg-options", "train.num_threads=1", "data.refcoco_datasets=refcoco"),
            *options,
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    return run


@torch.no_grad()
def collect(
    loaded: LoadedModel, listeners: Mapping[str, StoredWeights], seed: int, scenes: int, samples: int
) -> list[Region]:
    """Caption the regions of generated scenes, and ask the model and the listeners about every caption."""
    model, prompter, config = loaded.model, loaded.prompter, loaded.config
    settings = measuring_settings(config.loop)
    captioner, scorer = Captioner(model, prompter, settings, is_silent=True), Scorer(model, prompter, settings)
    found: list[Region] = []
    for part in in_chunks(range(scenes), 8):
        drawn = [(f"{seed}/{number}", generate_scene(pool_seed(seed, "filter", number))) for number in part]
        made = []
        for name, one in drawn:
            places = tuple(map(str, range(len(one.objects))))
            made.append(RegionSample("scenes", name, one.image, np.asarray(one.masks), places, ((),) * len(places)))
        batch = batch_from_samples(made, geometry(config), seed=seed)
        seen, owners = model.see(batch), batch.region_image.tolist()
        [captions] = captioner.write([seen], [batch], num_samples=samples)
        truths = [caption for _, one in drawn for caption in one.captions]
        regions = [
            Region(drawn[owner][0], truth, list(caption.written))
            for owner, truth, caption in zip(owners, truths, captions, strict=True)
        ]
        asked = [(n, one) for n, region in enumerate(regions) for one in region.written]
        texts = [(n, one.text if one.unreadable is None else None) for n, one in asked]
        spoken = [(n, one.token_ids) for n, one in asked]
        apart = {who: weights(listener) for who, listener in listeners.items()}
        for who, lent in {"own": nullcontext(), **apart}.items():
            with lent:
                likely = log_likelihoods(model, prompter, batch, seen, spoken, settings.caption_question).tolist()
                table = scorer.score(batch, seen, texts).tolist()
                [said] = captioner.write([seen], [batch])
            for region, caption in zip(regions, said, strict=True):
                region.said[who] = caption.text
            for (n, _), row, value in zip(asked, table, likely, strict=True):
                rest = [iou for place, iou in enumerate(row) if owners[place] == owners[n] and place != n]
                regions[n].ious.setdefault(who, []).append((row[n], max(rest, default=0.0)))
                regions[n].likelihoods.setdefault(who, []).append(value)
        pairs = [(n, place) for n, own in enumerate(owners) for place, other in enumerate(owners) if own == other]
        pairs = [(n, place) for n, place in pairs if n != place]
        turned = [(place, regions[n].written[0].token_ids) for n, place in pairs]
        values = log_likelihoods(model, prompter, batch, seen, turned, settings.caption_question).tolist()
        for (n, _), value in zip(pairs, values, strict=True):
            regions[n].others.append(value)
        found += regions
    return found


def scores_of(listeners: Sequence[str]) -> dict[str, Callable[[Region], float]]:
    """Return the scores of a greedy caption, by name."""

    def agreement(region: Region) -> float:
        greedy, *rest = [normalise_caption(one.text) for one in region.written]
        return sum(text == greedy for text in rest) / len(rest)

    def for_this_region(region: Region) -> float:
        length, own = len(region.written[0].token_ids), region.likelihoods["own"][0]
        return own * length - float(np.logaddexp.reduce([value * length for value in (own, *region.others)]))

    scores: dict[str, Callable[[Region], float]] = {
        "own IoU": lambda r: r.ious["own"][0][0],
        "own IoU minus the best other": lambda r: r.ious["own"][0][0] - r.ious["own"][0][1],
        "no other region fits better": lambda r: float(r.ious["own"][0][0] > r.ious["own"][0][1]),
        "own likelihood": lambda r: r.likelihoods["own"][0],
        "own likelihood + 0.1 own IoU": lambda r: r.likelihoods["own"][0] + 0.1 * r.ious["own"][0][0],
        "likelihood of this region against the others": for_this_region,
        "samples that agree": agreement,
    }
    for who in listeners:
        scores |= {
            f"{who}: IoU": lambda r, who=who: r.ious[who][0][0],
            f"{who}: IoU minus the best other": lambda r, who=who: r.ious[who][0][0] - r.ious[who][0][1],
            f"{who}: likelihood": lambda r, who=who: r.likelihoods[who][0],
            f"{who}: own and its likelihood": lambda r, who=who: r.likelihoods["own"][0] + r.likelihoods[who][0],
            f"{who}: the same and its IoU (trust)": lambda r, who=who: float(
                trust(*(torch.tensor(r.likelihoods[name][0]) for name in ("own", who)), torch.tensor(r.ious[who][0][0]))
            ),
        }
    return scores


def area(is_right: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the curve: how often a right caption scores above a wrong one, a tie counting half."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks, right = (np.cumsum(counts) - (counts - 1) / 2)[place], int(is_right.sum())
    pairs = right * (len(score) - right)
    return float((ranks[is_right].sum() - right * (right + 1) / 2) / pairs) if pairs else float("nan")


def areas(regions: Sequence[Region], scores: Mapping[str, Callable[[Region], float]]) -> dict[str, dict[str, float]]:
    """Return each score's area and its gain over own IoU with 95 % intervals over images, and who is right of a half.

    ``best_half_right``: the share of right captions among the better half by that score.
    """
    is_right, images = np.array([r.is_right() for r in regions]), np.array([r.image for r in regions])
    values = {name: np.array([score(r) for r in regions]) for name, score in scores.items()}
    members = [np.flatnonzero(images == image) for image in dict.fromkeys(images.tolist())]
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(members), size=len(members)) for _ in range(RESAMPLES)]
    picked = [np.concatenate([members[image] for image in draw]) for draw in draws]
    spread = {name: np.array([area(is_right[rows], own[rows]) for rows in picked]) for name, own in values.items()}
    result = {}
    for name, own in values.items():
        (low, high), gains = np.percentile(spread[name], [2.5, 97.5]), spread[name] - spread["own IoU"]
        better = np.argsort(-own, kind="stable")[: len(own) // 2]
        figures = {
            "area": area(is_right, own),
            "ci95_low": low,
            "ci95_high": high,
            "gain_ci95_low": np.percentile(gains, 2.5),
            "gain_ci95_high": np.percentile(gains, 97.5),
            "best_half_right": is_right[better].mean(),
        }
        result[name] = {key: round(float(value), 4) for key, value in figures.items()}
    return result


def choices(regions: Sequence[Region], listeners: Sequence[str]) -> list[dict[str, str | float | int]]:
    """Return what every rule of choosing a sample in place of the greedy caption does to right and wrong captions."""
    rows: list[dict[str, str | float | int]] = []
    for who in ("own", *listeners):
        for by in ("IoU", "likelihood") if who != "own" else ("IoU",):
            for margin in MARGINS:
                for floor in FLOORS:
                    rule, moves = BestOf(0, margin, floor), []
                    for r in regions:
                        own, heard = (torch.tensor(r.likelihoods[name]) for name in ("own", who))
                        if by == "IoU":
                            # The floor is on the captioner's likelihood alone; the rule compares IoUs.
                            heard = torch.tensor([iou for iou, _ in r.ious[who]])
                            own = torch.where(own < np.log(max(floor, 1e-30)), -1e9, 1e9)
                        chosen = rule.choose(r.written, own, heard)
                        moves.append((r.is_right(), r.is_right(chosen), chosen > 0))
                    counts = {
                        "right_to_wrong": sum(before and not after for before, after, _ in moves),
                        "wrong_to_right": sum(after and not before for before, after, _ in moves),
                        "replaced": sum(is_new for *_, is_new in moves),
                    }
                    rows.append({"listener": who, "by": by, "margin": margin, "floor": floor, **counts})
    return rows


def main() -> None:
    """Train the listeners, measure, write the figures and print the areas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=200, help="of each data seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22], help="of the scenes")
    parser.add_argument("--samples", type=int, default=8, help="captions sampled of each region, at temperature 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: train_listener(args.out, name) for name in LISTENERS}
    loaded = find_trained(overrides={"loop.max_new_tokens": 12}).load(torch.device("cpu"))
    trained, parts = trainable_parameters(loaded.model), (loaded.model, loaded.prompter, loaded.config)
    listeners = {name: StoredWeights(trained, read_listener(run, *parts)) for name, run in runs.items()}
    by_seed = {str(seed): collect(loaded, listeners, seed, args.scenes, args.samples) for seed in args.seeds}
    scores, result = scores_of(list(listeners)), {}
    for name, regions in {**by_seed, "all": [r for own in by_seed.values() for r in own]}.items():
        right = {who: [caption_exact(r.said[who], [r.truth]) for r in regions] for who in ("own", *listeners)}
        result[name] = {
            "regions": len(regions),
            "right": {who: round(sum(own) / len(own), 4) for who, own in right.items()},
            "areas": areas(regions, scores),
            "best_of": choices(regions, list(listeners)),
        }
    settings = {"scenes": args.scenes, "samples": args.samples, "listeners": LISTENERS}
    document = {"settings": settings, "by_data_seed": result}
    (args.out / "caption_filter.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, figures in result["all"]["areas"].items():
        print(f"{name:45} {figures['area']:.3f} ({figures['ci95_low']:.3f} to {figures['ci95_high']:.3f})")


if __name__ == "__main__":
    main()
