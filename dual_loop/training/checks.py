"""What stops a run before it does harm: values that are not finite, and memory that runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from dual_loop.errors import DualLoopError, EnvironmentProblem, explain
from dual_loop.training.devices import gather_objects

MAX_NAMES = 8


class NonFiniteError(DualLoopError):
    """A loss or gradient is infinite or not a number; no parameter was changed."""


def check_finite(
    accelerator: Accelerator,
    step: int,
    terms: Sequence[Mapping[str, float]],
    region_names: Sequence[Sequence[str]],
    grad_norm: float,
) -> None:
    """Raise on all ranks when any rank saw a value that is not finite. Call before the update.

    Costs one all-reduce of a flag where all is well.

    Args:
        step: number of the optimiser step, for the message.
        terms: for each micro-batch of this rank the value of its loss terms by name.
        region_names: for each micro-batch the names of its regions.
        grad_norm: norm of the gradient on this rank.

    Raises:
        NonFiniteError: names the rank, the term and the regions; all regions where only the gradient is wrong.
    """
    own = []
    for index, (values, names) in enumerate(zip(terms, region_names, strict=True)):
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            own.append(f"{', '.join(wrong)} in micro-batch {index} ({_shorten(names)})")
    if not own and not math.isfinite(grad_norm):
        names = [name for group in region_names for name in group]
        own.append(f"gradient norm = {grad_norm}, losses finite, in the regions {_shorten(names)}")
    flag = torch.tensor(float(bool(own)), device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flag)
    if not flag.item():
        return
    everywhere = enumerate(gather_objects(accelerator, own))
    raise NonFiniteError(
        explain(
            "a loss or gradient is not finite; nothing was updated",
            where=f"optimiser step {step}",
            seen="; ".join(f"rank {rank}: {message}" for rank, messages in everywhere for message in messages),
            expected="finite numbers",
            fix="look at the regions named; lower --learning_rate, check --max_grad_norm, or resume from the last "
            "checkpoint with --mixed_precision no",
        )
    )


@contextmanager
def memory_errors_explained(step: int) -> Iterator[None]:
    """Turn running out of memory into an EnvironmentProblem that says which flags to change."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise EnvironmentProblem(
            explain(
                "out of memory",
                where=f"optimiser step {step}",
                seen=str(error).splitlines()[0],
                fix="lower --batch_size (and raise --gradient_accumulation_steps), --regions_per_image or "
                "--max_new_tokens; or --cfg-options speed.images_at_once=1 model.gradient_checkpointing=True "
                "speed.checkpoint_layers=all loop.rollout_batch_size=8 (loop.max_new_tokens bounds the captions)",
            )
        ) from error


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
