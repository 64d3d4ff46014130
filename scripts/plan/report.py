"""What a counted step takes on stated machines: seconds by phase, days, and whether it fits.

Every rate is the reader's own statement. A phase takes at least as long as its operations at the stated rate, and at
least as long as the operands of its products at the stated bandwidth (a roofline); what lies between products is not
counted, so a real step is slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dual_loop.config import Config
from dual_loop.errors import ConfigError, explain

from bench.phases import PHASES
from plan.step import CountedStep

GIB, DAY = 2**30, 86_400.0
ALL_REDUCE = "all-reduce"
STEP_ONE = ("vision tower", "prompt prefill", "decode")
"""The phases of captioning. Step 2 reads the vision tower's features too, where they are shared."""


@dataclass(frozen=True)
class Machines:
    """N GPUs, as stated by the reader.

    Attributes:
        gpus: how many.
        flops_per_second: of one GPU in dense products of the model's dtype, what is reached in practice.
        bytes_per_second: of one GPU's memory.
        memory_bytes: of one GPU; None where it is not stated.
        link_bytes_per_second: each GPU's, for the all-reduce of gradients; None where it is not stated.
    """

    gpus: int
    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float | None = None
    link_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        rates = {"flops_per_second": self.flops_per_second, "bytes_per_second": self.bytes_per_second}
        optional = {"memory_bytes": self.memory_bytes, "link_bytes_per_second": self.link_bytes_per_second}
        rates.update({name: value for name, value in optional.items() if value is not None})
        wrong = [f"{name} {value:g}" for name, value in {"gpus": self.gpus, **rates}.items() if not value > 0]
        if wrong:
            raise ConfigError(explain("machines are not possible", seen=", ".join(wrong), expected="more than 0"))


def phase_seconds(step: CountedStep, machines: Machines) -> dict[str, float]:
    """Return the seconds of every phase of one step, the all-reduce of trained gradients included.

    The all-reduce is that of a ring: every rank sends and receives ``2 (N - 1) / N`` times the float32 gradients. It is
    added as if nothing ran beside it, though DDP starts it during the backward pass.
    """
    seconds = {
        phase: max(step.flops[phase] / machines.flops_per_second, step.bytes[phase] / machines.bytes_per_second)
        for phase in PHASES
    }
    if machines.gpus > 1 and machines.link_bytes_per_second is not None:
        seconds[ALL_REDUCE] = all_reduce_bytes(step, machines) / machines.link_bytes_per_second
    return seconds


def all_reduce_bytes(step: CountedStep, machines: Machines) -> float:
    """Return what one rank sends in a step."""
    return 2.0 * (machines.gpus - 1) / machines.gpus * 4.0 * step.trained


def memory_parts(step: CountedStep) -> dict[str, float]:
    """Return bytes of one rank by part at the fullest moment; they add up to ``step.peak``."""
    is_training = sum(step.training.values()) >= sum(step.captioning.values())
    parts = {name: value for name, value in step.state.items() if value}
    for phase, value in (step.training if is_training else step.captioning).items():
        if value:
            parts[_MEMORY_NAMES.get(phase, phase)] = float(value)
    return parts


_MEMORY_NAMES = {
    "vision tower": "image features",
    "prompt prefill": "captioning: prefixes, caches",
    "decode": "captioning: rows, logits",
    "language forward": "language activations",
    "SAM 2 encoder": "SAM 2 features",
    "mask decoder": "mask decoder activations",
    "losses": "logits and losses",
    "backward": "backward (recomputed layer)",
    "other": "inputs and the rest",
}


def plan_values(step: CountedStep, machines: Machines, config: Config, steps: int | None) -> dict[str, Any]:
    """Return everything that the report shows, as JSON values; bytes and seconds."""
    seconds = phase_seconds(step, machines)
    total = sum(seconds.values())
    effective = step.images * machines.gpus
    return {
        "machines": vars(machines),
        "step": {
            "effective_batch": effective,
            "images": step.images,
            "regions": step.regions,
            "captions": step.captions,
            "new_tokens": config.loop.max_new_tokens,
            "row_tokens": step.row_tokens,
            "trained": step.trained,
        },
        "flops": step.flops,
        "bytes": step.bytes,
        "seconds": seconds,
        "seconds_a_step": total,
        "captioning_share": sum(seconds[phase] for phase in STEP_ONE) / total,
        "steps": steps,
        "days": None if steps is None else total * steps / DAY,
        "memory": memory_parts(step),
        "memory_peak": step.peak,
        "memory_captioning": sum(step.state.values()) + sum(step.captioning.values()),
        "memory_training": sum(step.state.values()) + sum(step.training.values()),
        "language_activations": step.language_activations,
        "host_starting_copy": step.starting_copy,
        "fits": None if machines.memory_bytes is None else step.peak <= machines.memory_bytes,
    }


def steps_of(images: int, epochs: int, effective_batch: int) -> int:
    """Return the optimiser steps that ``epochs`` passes over ``images`` take."""
    return math.ceil(images / effective_batch) * epochs


def report(values: Mapping[str, Any], config: Config) -> str:
    """Return the plan as Markdown tables."""
    step, machines = values["step"], values["machines"]
    lines = [
        f"Plan of {config.model.name}: {machines['gpus']} GPUs x {step['images']} images a step "
        f"= effective batch {step['effective_batch']}; {step['regions']} regions and {step['captions']} captions of "
        f"{step['new_tokens']} tokens a GPU.",
        f"Stated as reached, not measured: {machines['flops_per_second'] / 1e12:.4g} TFLOP/s and "
        f"{machines['bytes_per_second'] / 1e9:.4g} GB/s a GPU. Operations are counted; seconds are the least that "
        "these rates allow.",
        "",
        *_phase_table(values),
        "",
        *_totals(values),
        "",
        *_memory_table(values),
    ]
    return "\n".join(lines)


def _phase_table(values: Mapping[str, Any]) -> list[str]:
    machines, seconds = values["machines"], values["seconds"]
    lines = ["| phase | TFLOP | GB | seconds | bound by |", "| --- | ---: | ---: | ---: | --- |"]
    for phase in PHASES:
        flops, moved = values["flops"][phase], values["bytes"][phase]
        if not (flops or moved):
            continue
        is_compute = flops / machines["flops_per_second"] >= moved / machines["bytes_per_second"]
        bound = "operations" if is_compute else "memory"
        lines.append(f"| {phase} | {flops / 1e12:.4g} | {moved / 1e9:.4g} | {seconds[phase]:.4g} | {bound} |")
    if ALL_REDUCE in seconds:
        lines.append(f"| {ALL_REDUCE} | 0 | | {seconds[ALL_REDUCE]:.4g} | link |")
    elif machines["gpus"] > 1:
        lines.append(f"| {ALL_REDUCE} | 0 | | not planned | link not stated |")
    flops, moved = sum(values["flops"].values()), sum(values["bytes"].values())
    return [*lines, f"| a step | {flops / 1e12:.4g} | {moved / 1e9:.4g} | {values['seconds_a_step']:.4g} | |"]


def _totals(values: Mapping[str, Any]) -> list[str]:
    total = values["seconds_a_step"]
    lines = [
        f"{total:.4g} s a step, {values['step']['effective_batch'] / total:.4g} images/s on all GPUs; "
        f"captioning takes {values['captioning_share']:.0%}."
    ]
    if values["days"] is not None:
        lines.append(f"{values['steps']:,} steps: {values['days']:.3g} days, without evaluation, audits and saving.")
    return lines


def _memory_table(values: Mapping[str, Any]) -> list[str]:
    lines = ["| memory of a GPU | GiB |", "| --- | ---: |"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in values["memory"].items()]
    lines += [f"| at the fullest moment | {values['memory_peak'] / GIB:.2f} |", ""]
    both = (("training", values["memory_training"]), ("captioning", values["memory_captioning"]))
    lines.append("; ".join(f"while {name} {size / GIB:.2f} GiB" for name, size in both) + ".")
    kept = values["language_activations"]
    lines.append(
        "Language activations kept for backward: "
        + ", ".join(f"{size / GIB:.2f} GiB with gradient checkpointing {name}" for name, size in kept.items())
        + f". On the host: a copy of the starting weights, {values['host_starting_copy'] / GIB:.2f} GiB."
    )
    if values["fits"] is not None:
        size = values["machines"]["memory_bytes"] / GIB
        verdict = "Fits" if values["fits"] else "DOES NOT FIT"
        lines.append(
            f"{verdict} in {size:.4g} GiB: {values['memory_peak'] / GIB:.2f} GiB by tensors alone; leave room for the "
            "CUDA context, work spaces of libraries and fragmentation."
        )
    return lines


def check_report(step: CountedStep, measured: Mapping[str, Any], floor: Mapping[str, float]) -> tuple[str, Any]:
    """Compare a plan with a step that ``scripts/bench_step.py`` took and counted.

    Args:
        step: the plan of the same setting.
        measured: ``variants.default`` of the file.
        floor: its measured rates, which the plan is given.

    Returns:
        The report, and its ratios as JSON values: planned / counted operations and bytes, measured / planned seconds.
    """
    rates = Machines(1, floor["flops_per_second"], floor["bytes_per_second"])
    seconds, ratios = phase_seconds(step, rates), {}
    lines = [
        f"Rates measured beside the step: {rates.flops_per_second / 1e9:.0f} GFLOP/s, "
        f"{rates.bytes_per_second / 1e9:.1f} GB/s. Planned seconds are the least that these allow.",
        "",
        "| phase | planned GFLOP | counted GFLOP | ratio | planned GB | counted GB | planned s | measured s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for phase in PHASES:
        flops, counted = step.flops[phase], measured["flops"][phase]
        ratio = flops / counted if counted else None
        ratios[phase] = ratio
        lines.append(
            f"| {phase} | {flops / 1e9:.2f} | {counted / 1e9:.2f} | {'' if ratio is None else f'{ratio:.3f}'} | "
            f"{step.bytes[phase] / 1e9:.2f} | {measured['bytes'][phase] / 1e9:.2f} | "
            f"{seconds[phase]:.3f} | {measured['phases'][phase]:.3f} |"
        )
    planned_mb = (step.peak + step.starting_copy) / 2**20
    values = {
        "flops_by_phase": ratios,
        "flops": sum(step.flops.values()) / sum(measured["flops"].values()),
        "planned_seconds": sum(seconds.values()),
        "measured_seconds": measured["seconds"],
        "planned_mb": planned_mb,
        "measured_mb": measured["peak_above_imports_mb"],
    }
    lines += [
        "",
        f"operations: planned / counted {values['flops']:.3f}",
        f"seconds a step: planned {values['planned_seconds']:.2f}, measured {values['measured_seconds']:.2f}, "
        f"measured / planned {values['measured_seconds'] / values['planned_seconds']:.2f}",
        f"peak memory above imports (MiB): planned {planned_mb:.0f}, measured {values['measured_mb']:.0f}, "
        f"measured / planned {values['measured_mb'] / planned_mb:.2f}",
    ]
    return "\n".join(lines), values
