"""What a run says while it trains: printed lines, the record of a step, its curves, and example panels."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dual_loop.config import GATES
from dual_loop.drawing import Panel
from dual_loop.errors import EnvironmentProblem, explain, writing
from dual_loop.metrics import iou, iou_table, mask_overlap, own_and_margin, own_image_only, ratio
from dual_loop.training import ranks
from dual_loop.training.run_folder import truncate_metrics, write_json
from dual_loop.types import PackedBatch, RegionSample

PHASES = ("data", "rollout", "forward", "backward", "optimiser")
MAIN_TERMS = ("mask_loss", "dice_loss", "llm_loss")
METRICS_NAME = "metrics.jsonl"
PROJECT = "dual_loop"
"""What trackers file runs under."""

# ---- printed lines ---------------------------------------------------------------------------------------------------


class Reporter:
    """Prints lines on rank 0, above the progress bar where there is one."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main

    def __call__(self, line: str) -> None:
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def set_up_logging(self) -> None:
        """Send the package's warnings to stderr, from rank 0 only; what other ranks meet is in the counters."""
        logger = logging.getLogger("dual_loop")
        if not any(isinstance(handler, LineHandler) for handler in logger.handlers):
            logger.addHandler(LineHandler())
        logger.setLevel(logging.INFO if self.is_main else logging.CRITICAL)
        if not self.is_main:
            warnings.simplefilter("ignore")


class LineHandler(logging.Handler):
    """Writes messages to the standard error of the moment, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


# ---- the numbers of a step -------------------------------------------------------------------------------------------


class PhaseTimer:
    """Seconds of one optimiser step, by phase.

    Args:
        device: on CUDA the queue is drained at the end of each phase where ``exact`` is set; kernels run later than
            the Python that starts them, and would be counted under the wrong phase.
    """

    def __init__(self, device: torch.device, exact: bool) -> None:
        self.must_wait = exact and device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.start = self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """Count the time since the phase before ended under ``phase``."""
        if self.must_wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def total(self) -> dict[str, float]:
        """Return seconds of all phases and ``total`` since construction, to a tenth of a millisecond."""
        whole = {"total": time.perf_counter() - self.start, **self.seconds}
        return {name: round(value, 4) for name, value in whole.items()}


@torch.no_grad()
def step_metrics(packed: PackedBatch, mask_logits: torch.Tensor) -> dict[str, float]:
    """Return what a micro-batch adds to the records: IoU by where the caption is from, lengths, and counters.

    ``mask_logits``: (N, Q, Q), those of later frames of clips behind. A key ``x/sum`` goes with ``x/count``.
    Of everything that step 1 wrote it is counted how often each gate closed on it, and how often it was cut off.
    """
    batch, captions = packed.batch, packed.captions
    rejected = torch.tensor([caption.rejected is not None for caption in captions])
    # A rejected caption is an empty mask, whatever step 2 reads in its place.
    predicted = (mask_logits[: len(captions)] > 0) & ~rejected.to(mask_logits.device)[:, None, None]
    own = torch.arange(batch.num_regions)
    table = own_image_only(iou_table(predicted, batch.binary_targets).cpu(), own, batch.region_image)
    ious, margins = (values.tolist() for values in own_and_margin(table, own))
    pairs = list(zip(captions, ious, margins, strict=True))
    generated = [caption for caption in captions if not caption.is_reference]
    written = [one for caption in captions for one in caption.written]
    return {
        "regions": float(len(ious)),
        "tokens": float(packed.input_ids.numel()),
        **ratio("cycle_iou", [iou for caption, iou, _ in pairs if not caption.is_reference]),
        **ratio("reference_iou", [iou for caption, iou, _ in pairs if caption.is_reference]),
        **ratio("uniqueness", [m for caption, _, m in pairs if not caption.is_reference and m == m]),
        **ratio("caption_tokens", [len(caption.token_ids) for caption in generated]),
        **ratio("caption_words", [len(caption.text.split()) for caption in generated]),
        "caption/rejected": float(sum(caption.rejected is not None for caption in captions)),
        "prompt/grid_rescued": float(batch.grid_rescued.sum()),
        **{f"gate/{name}": float(sum(one.gate == name for one in written)) for name in GATES},
        **ratio("gated", [float(one.gate is not None) for one in written]),
        **ratio("truncated", [float(one.truncated) for one in written]),
        **{name: float(value) for name, value in packed.metrics.items()},
    }


def add_into(sums: dict[str, float], values: Mapping[str, float], prefix: str = "") -> None:
    """Add ``values`` to ``sums`` key by key; a key that is new starts at 0."""
    for name, value in values.items():
        sums[prefix + name] = sums.get(prefix + name, 0.0) + float(value)


def reduce_sums(accelerator: Accelerator, sums: Mapping[str, float]) -> dict[str, float]:
    """Add ``sums`` over all ranks in one all-reduce of float64 numbers; every rank must give the same keys."""
    if accelerator.num_processes == 1:
        return dict(sums)
    names = sorted(sums)
    values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=accelerator.device)
    with ranks.exchange():
        torch.distributed.all_reduce(values)
        summed = values.tolist()
    return dict(zip(names, summed, strict=True))


def counters_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Return what is summed over the whole run: names such as ``caption/rejected``, but no half of a ratio."""
    return {name: value for name, value in sums.items() if "/" in name and not name.endswith(("/sum", "/count"))}


def ratios_and_values(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Turn ``x/sum`` and ``x/count`` into the ratio ``x`` (None without a count) and keep plain per-step values."""
    result: dict[str, float | None] = {}
    for name, value in sums.items():
        if name.endswith("/sum"):
            base = name.removesuffix("/sum")
            count = sums[f"{base}/count"]
            result[base] = value / count if count else None
        elif "/" not in name:
            result[name] = value
    return result


@dataclass(frozen=True)
class StepRecord:
    """One logged optimiser step, over all ranks."""

    step: int
    epoch: int  # both from 1
    losses: Mapping[str, float]  # each term's weighted average over the step
    grad_norm: float | None  # before clipping; None: beyond float16, and the step changed nothing
    lr: float
    ranks: int
    seconds: Mapping[str, float]  # by phase, and total
    values: Mapping[str, float | None]  # averages of the step, None where there was nothing to average
    counters: Mapping[str, int]  # over the whole run so far

    def to_dict(self) -> dict[str, object]:
        """Return the record as a line of ``metrics.jsonl`` holds it."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": sum(self.losses.values()),
            **{name: self.losses[name] for name in MAIN_TERMS},
            "other_losses": {name: value for name, value in self.losses.items() if name not in MAIN_TERMS},
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "ranks": self.ranks,
            "seconds": dict(self.seconds),
            **self.values,
            "counters": dict(self.counters),
        }

    def line(self, total_steps: int, pace: float) -> str:
        """Return the printed line: losses first, then where we are and what went wrong so far.

        Args:
            pace: seconds a step took on average.
        """
        others = [name for name in self.losses if name not in MAIN_TERMS]
        parts = [f"loss={sum(self.losses.values()):.3f}"]
        parts += [f"{name}={self.losses[name]:.3f}" for name in (*MAIN_TERMS, *others)]
        left = timedelta(seconds=round((total_steps - self.step) * pace))
        parts += [f"step {self.step}/{total_steps}", f"lr={self.lr:.2e}", f"{pace:.2f} s/step", f"{left} left"]
        parts.append(f"regions={self.values.get('regions') or 0:.0f}")
        cycle_iou = self.values.get("cycle_iou")
        if cycle_iou is not None:
            parts.append(f"cycle_iou={cycle_iou:.3f}")
        shown = {name: value for name, value in self.counters.items() if value and name.count("/") == 1}
        return ", ".join([*parts, *(f"{name}={value}" for name, value in shown.items())])


# ---- the files of records --------------------------------------------------------------------------------------------


class MetricsLog:
    """``metrics.jsonl``, one record a logged step, and the same numbers wherever the run is followed.

    Args:
        folder: of the run.
        writes: False on all ranks but 0: every method then does nothing.
        report_to: names of trackers, see ``train.report_to``. Where they keep their numbers is theirs to say (by
            ``WANDB_MODE``, ``TRACKIO_DIR``, ``MLFLOW_TRACKING_URI``, ...), but for the curves below ``tensorboard/``.
    """

    def __init__(self, folder: Path, writes: bool = True, report_to: Sequence[str] = ("tensorboard",)) -> None:
        self.folder, self.writes, self.report_to = folder, writes, report_to
        self._trackers: list[GeneralTracker] | None = None

    def open(self, step: int, settings: Mapping[str, object] | None = None) -> None:
        """Open the logs after ``step`` steps; records of later steps, which will be done again, are removed.

        Args:
            settings: of the run, which trackers show beside its numbers.

        Raises:
            EnvironmentProblem: the library of a tracker is missing, or cannot be started.
        """
        if self.writes:
            truncate_metrics(self.folder / METRICS_NAME, step)
            self._trackers = [self._start(name, step, settings or {}) for name in self.report_to if name != "none"]

    def write(self, record: StepRecord) -> None:
        """Append ``record``, and give its numbers to the trackers."""
        self._append(record.step, record.to_dict())

    def write_evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Append what was measured on the held-out set after ``step``."""
        self._append(step, {"step": step, "evaluation": dict(figures)})

    def _append(self, step: int, document: Mapping[str, object]) -> None:
        if self._trackers is None:
            return
        path = self.folder / METRICS_NAME
        line = json.dumps(document) + "\n"
        with writing("a record", path, len(line)), path.open("a", encoding="utf-8") as stream:
            stream.write(line)
        numbers = {name: value for name, value in _flat(document).items() if name != "step" and value is not None}
        for tracker in self._trackers:
            with writing("the curves", self.folder / tracker.name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        for tracker in self._trackers or ():
            with writing("the curves", self.folder / tracker.name):
                tracker.finish()
        self._trackers = None

    def _start(self, name: str, step: int, settings: Mapping[str, object]) -> GeneralTracker:
        """Start a tracker, on the run that it followed before where the folder knows of one."""
        ids, own = self.folder / "trackers.json", self.folder.resolve().name
        known = json.loads(ids.read_text(encoding="utf-8")) if ids.is_file() else {}
        common = {"name": own, "resume": "allow"}
        every: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": name, "logging_dir": self.folder, "purge_step": step + 1},
            "wandb": {"run_name": PROJECT, "dir": self.folder, "id": known.get(name), **common},
            "trackio": {"run_name": PROJECT, **common},
            "mlflow": {"experiment_name": PROJECT, "run_id": known.get(name), "run_name": own},
        }
        try:
            with writing("the curves", self.folder / name):
                tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](**every[name])
                tracker.start()
                if name != "tensorboard":  # which would open a second run for them
                    tracker.store_init_configuration(_flat(settings))
        except EnvironmentProblem:
            raise
        except Exception as error:  # each library has its own types
            fix = f"pip install {name}" if isinstance(error, ImportError) else f"see {name}'s own settings"
            what = f"{name} cannot be started"
            raise EnvironmentProblem(
                explain(what, "--report_to", error, fix=f"{fix}, or another --report_to")
            ) from error
        if name in ("wandb", "mlflow") and name not in known:
            run = tracker.tracker
            known[name] = run.id if name == "wandb" else run.info.run_id
            write_json(ids, known)
        return tracker


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested mappings under names such as ``group/name``."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        flat |= {f"{name}/{key}": one for key, one in inner.items()} if inner else {name: value}
    return {name: value for name, value in flat.items() if value != {}}


# ---- example panels --------------------------------------------------------------------------------------------------


def choose_regions(sources: Sequence[str], limit: int) -> list[int]:
    """Pick up to ``limit`` positions so that every source comes once before any comes twice."""
    rounds = [sources[:position].count(source) for position, source in enumerate(sources)]
    return sorted(range(len(sources)), key=rounds.__getitem__)[:limit]


def make_panels(
    regions: Sequence[tuple[PackedBatch, torch.Tensor, int]], samples: Sequence[RegionSample]
) -> list[Panel]:
    """Collect what is drawn of ``regions``: of each its micro-batch, that one's mask logits (N, Q, Q), and its number.

    Raises:
        RuntimeError: a sample is not what the micro-batch was made of.
    """
    targets = [(sample.segmentation_image, sample.segmentation_masks) for sample in samples]
    panels = []
    for (packed, masks, region), sample, (image, target_masks) in zip(regions, samples, targets, strict=True):
        batch, caption = packed.batch, packed.captions[region]
        position = region - int((batch.region_image < batch.region_image[region]).sum())
        name = f"{sample.source}/{sample.sample_id}#{sample.region_ids[position]}"
        if name != batch.region_names[region]:
            wanted = batch.region_names[region]
            raise RuntimeError(f"the panel of {wanted} would show {name}: the data changed on the disk")
        target, logits = target_masks[position], masks[region][None, None].float()
        # As evaluation does: logits are resized, and cut at 0.
        resized = F.interpolate(logits, target.shape, mode="bilinear", align_corners=False)[0, 0]
        predicted = (resized > 0).cpu().numpy()
        origin = "reference" if caption.is_reference else "rejected" if caption.rejected else "generated"
        value = float(iou(*mask_overlap(predicted[None], target[None]))[0])
        mask = sample.masks[position]
        panels.append(Panel(name, sample.image, mask, caption.text, origin, image, target, predicted, value))
    return panels
