"""What is run for the tables of ``docs/experiments.md``: a run is one training, on data of one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SEEDS = tuple(range(6))
TUNING_SEED = 100
LISTENER_SEED = 77
VAGUE = 0.5
"""Share of the captions of people that name the shape alone, in the table of rewards."""

CAPTIONS = ("written", "true", "constant", "shuffled", "start", "none")
"""Of the scenes with masks: written by the loop, those of the generator, ``the object`` for all, each another region's,
those of the starting weights, or no such scenes at all."""


RATES = {"loop": 8e-4, "true": 1.6e-3, "captioned": 1.6e-3}
"""Peak learning rates that were best in the table of tuning, for true captions of all, for captioned scenes alone, and
for all else."""


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        table, arm: where its figures go.
        seed: of its data and of its training.
        captions: of the scenes with masks, one of :data:`CAPTIONS`.
        scenes: how many these are. captioned: scenes whose captions people gave; a quarter of the samples.
        steps, rate: optimiser steps, and the peak learning rate.
        vague: share of the captions of people that are vague.
        everything: the 300 captioned scenes that the start was made of train too.
        stops_early: the checkpoint that is best on the tuning scenes is measured.
        without_pairs: neither the start nor the captions of people name one colour of each shape.
        flags: of the trainer.
        settings: of the trainer, behind ``--cfg-options``.
    """

    table: str
    arm: str
    seed: int
    captions: str = "written"
    scenes: int = 1800
    captioned: int = 60
    steps: int = 450
    rate: float = RATES["loop"]
    vague: float = 0.0
    everything: bool = False
    stops_early: bool = False
    without_pairs: bool = False
    flags: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.table}/{self.arm}_s{self.seed}"


NEAREST = ("data.target_pooling=nearest", "loss.points_from=grid")
"""Targets as Sa2VA trains."""

GRPO = ("--caption_gradient", "grpo", "--captions_per_region", "4", "--cycle_reward_weight", "1")


def core() -> list[Run]:
    """What is the loop worth beside captions of every other kind?"""
    loop = Run("core", "loop", 0)
    true = replace(loop, arm="true", captions="true", rate=RATES["true"])
    alone = replace(loop, captions="none", everything=True, stops_early=True, rate=RATES["captioned"])
    arms = [
        loop,
        *(replace(loop, arm=kind, captions=kind) for kind in ("constant", "shuffled", "start")),
        true,
        replace(alone, arm="captioned"),
        replace(alone, arm="captioned_1050", steps=1050),
        replace(loop, arm="loop_nearest", settings=NEAREST),
        replace(true, arm="true_nearest", settings=NEAREST),
        replace(true, arm="true_1050", steps=1050),
        replace(true, arm="true_1050_nearest", steps=1050, settings=NEAREST),
        replace(loop, arm="loop_1050", steps=1050),
        replace(loop, arm="loop_everything", everything=True),
        replace(loop, arm="loop_everything_1050", everything=True, steps=1050),
    ]
    return [replace(run, seed=seed) for seed in SEEDS for run in arms]


def tuning() -> list[Run]:
    """Which rate? On data of a seed of its own, measured on scenes that no table shows."""
    kinds = {"loop": {}, "true": {"captions": "true"}, "captioned": {"captions": "none", "everything": True}}
    return [
        Run("tuning", f"{name}_{rate:g}", TUNING_SEED, rate=rate, stops_early=name == "captioned", **options)
        for name, options in kinds.items()
        for rate in (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
        if rate < 3e-3 or name == "captioned"
    ]


def listener() -> list[Run]:
    """Train the listener that judges captions: on captioned scenes of another seed, from the same start."""
    return [Run("listener", "true", LISTENER_SEED, captions="true", rate=RATES["true"])]


def rewards() -> list[Run]:
    """What do rewards teach a captioner whose examples are vague?"""
    plain = Run("rewards", "plain", 0, vague=VAGUE)
    arms = [
        plain,
        replace(plain, arm="unsupervised", settings=("loop.caption_supervision=False",)),
        replace(plain, arm="kl", flags=("--kl_weight", "0.1")),
        replace(plain, arm="grpo_own", flags=GRPO),
        replace(plain, arm="grpo_independent", flags=(*GRPO, "--reward_listener", "{listener}")),
    ]
    return [replace(run, seed=seed) for seed in range(4) for run in arms]


def scaling() -> list[Run]:
    """How much of the gain comes from masks, how much from captions?"""
    runs = []
    for scenes in (150, 450, 1800):
        for captioned in (20, 60, 300):
            ends = (scenes, captioned) in ((150, 20), (1800, 300))
            for steps in (450, 1050) if ends else (450,):
                runs.append(
                    Run("scaling", f"{scenes}x{captioned}_{steps}", 0, scenes=scenes, captioned=captioned, steps=steps)
                )
    return [replace(run, seed=seed) for seed in range(2) for run in runs]


def codes() -> list[Run]:
    """Does a rewarded captioner drift into a private code, and do the gates hold it?"""
    return [
        Run("codes", f"{name}_{steps}", seed, vague=VAGUE, steps=steps, flags=(*GRPO, "--policy_temperature", "1.5"),
            settings=settings)
        for seed in range(2)
        for steps in (150, 450, 900)
        for name, settings in (("gates", ()), ("no_gates", ("reward.gates=()",)))
    ]  # fmt: skip


def composition() -> list[Run]:
    """Does the loop carry over to pairs of words that no caption named, and to expressions of other kinds?"""
    loop = Run("composition", "loop", 0, without_pairs=True)
    arms = [
        replace(loop, arm="start", steps=0),
        replace(loop, arm="captioned", captions="none", rate=RATES["captioned"]),
        loop,
        replace(loop, arm="loop_no_target", flags=("--no_target_weight", "0.1")),
    ]
    return [replace(run, seed=seed) for seed in range(3) for run in arms]


TABLES = {
    "tuning": tuning,
    "listener": listener,
    "core": core,
    "rewards": rewards,
    "composition": composition,
    "scaling": scaling,
    "codes": codes,
}


def runs_of(tables: list[str]) -> Iterator[Run]:
    """Yield the runs of ``tables`` in the order in which they are to be done."""
    for name in tables:
        yield from TABLES[name]()
