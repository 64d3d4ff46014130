"""The data: what every source holds, what its readers make of it, and what must not be in it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dual_loop.config import Config, DataConfig
from dual_loop.data.dataset_builder import check_costs, given_roots, left_out_of, missing_roots, open_source
from dual_loop.data.leakage import Leak, held_out_of, leaked_by_id, leaked_by_sight
from dual_loop.data.masks_dir import MasksDir
from dual_loop.data.names import SETTING_PREFIX
from dual_loop.data.prepare import Geometry, prepare_sample, sample_rng
from dual_loop.data.reader import Reader
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError, SampleError
from dual_loop.iteration import evenly_spread, progress_bar
from dual_loop.model.build import geometry
from dual_loop.preflight.findings import NOTE, OK, PROBLEM, WARNING, Finding
from dual_loop.types import Batch, RegionSample

ALL = 1 << 20
"""More regions than an image has: all are read."""

DECODED = 8
LOOKED_AT = 20_000
"""Most images of a source that are compared by sight; more take minutes."""

EXPECTED = {
    ("refcoco", "train"): (16994, 42404),
    ("refcoco", "val"): (1500, 3811),
    ("refcoco", "testA"): (750, 1975),
    ("refcoco", "testB"): (750, 1810),
    ("refcocog", "train"): (None, 42226),
    ("refcocog", "val"): (None, 2573),
    ("refcocog", "test"): (None, 5023),
}
"""(images, references) of a split, from the releases: refs(unc).p of RefCOCO, refs(umd).p of RefCOCOg."""


@dataclass
class SourceReport:
    """What was found when a source was read.

    Attributes:
        entries: in its index.
        read: how many entries were read; good: how many of these can be used.
        reasons: why the others cannot, with one message each; passed_over: regions of good ones that cannot be used.
        regions, captions, areas, sizes, rescued: of the good ones: regions an image, captions a region, share of the
            image that a mask covers, (H, W) of images, regions whose grid cell had to be rescued.
    """

    name: str
    entries: int
    read: int = 0
    good: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    regions: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    rescued: int = 0


def open_sources(data: DataConfig) -> tuple[list[Reader], list[Finding]]:
    """Open every data set that is given, one by one, so that one broken root does not hide the others."""
    sources, findings = [], []
    for name in given_roots(data):
        try:
            sources.append(open_source(name, data))
        except ConfigError as error:
            findings.append(Finding(PROBLEM, "data", f"{name}: {error}", f"check --{SETTING_PREFIX[name]}_dir"))
    if not given_roots(data):
        findings += [Finding(PROBLEM, "data", problem) for problem in missing_roots(data)]
    return sources, findings


def read_entry(source: Reader, index: int, sizes: Geometry, seed: int) -> tuple[RegionSample, Batch]:
    """Read and prepare one entry the way that training does.

    Raises:
        SampleError: it cannot be used.
    """
    source.vanishes = sizes.vanishes
    rng = sample_rng(seed, f"{source.name}/{source.entry_id(index)}")
    sample = source.load(index, rng)
    return sample, prepare_sample(sample, sizes, rng, seed, index)


def read_source(
    source: Reader, count: int | None, sizes: Geometry, seed: int = 0, regions: int | None = None
) -> SourceReport:
    """Read ``count`` entries, evenly spread (None: all); ``seed`` draws their regions, ``regions`` of each at most."""
    if regions is not None:
        source = copy.copy(source)
        source.regions_per_image = regions
    report = SourceReport(source.name, len(source))
    indices = evenly_spread(len(source), len(source) if count is None else count)
    for index in progress_bar(f"reading {source.name}", "entry", len(indices), indices):
        report.read += 1
        try:
            sample, prepared = read_entry(source, index, sizes, seed)
        except SampleError as error:
            report.reasons[error.reason] += 1
            report.messages.setdefault(error.reason, str(error))
            continue
        report.good += 1
        for region in prepared.passed_over:
            report.passed_over[region.reason] += 1
            report.messages.setdefault(f"region with {region.reason}", region.message)
        report.regions.append(sample.num_regions)
        report.captions += [len(texts) for texts in sample.captions]
        report.words += [len(text.split()) for texts in sample.captions for text in texts]
        report.areas += [float(mask.mean()) for mask in sample.masks]
        report.sizes.append((sample.image.shape[0], sample.image.shape[1]))
        report.rescued += int(prepared.grid_rescued.sum())
    return report


def check_sources(sources: Sequence[Reader], count: int | None, config: Config) -> Iterator[Finding]:
    """Read ``count`` entries of each source (None: all) and say how it did."""
    for source in sources:
        if source.contents:
            yield Finding(OK, "data", f"{source.name}: {source.contents}")
        # Of the two others, all regions of an image take seconds.
        drawn = source.regions_per_image if source.name in ("sav", "sa1b") else ALL
        report = read_source(source, count, geometry(config), config.train.seed, drawn)
        yield from findings_of(report, config.data.max_bad_fraction)
        yield from expected_counts(source)
        for name, text in left_out_of([source]):
            yield Finding(WARNING, "data", f"{name}: left out {text}", "add or mend what is missing, or train without")
    yield from (Finding(NOTE, "data", text) for text in check_costs())


def findings_of(report: SourceReport, max_bad_fraction: float) -> Iterator[Finding]:
    """Say how a source did; a source that would stop a run is a problem."""
    text = f"{report.name}: {report.entries:,} entries, {report.good} of {report.read} read are good"
    bad = report.read - report.good
    if not bad:
        yield Finding(OK, "data", text)
    else:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.most_common())
        level = PROBLEM if bad > max_bad_fraction * report.read else WARNING
        yield Finding(level, "data", f"{text} ({reasons})", "mend these files, or raise data.max_bad_fraction")
    if report.passed_over:
        used = sum(report.regions)
        reasons = "".join(f", {count:,} {reason}" for reason, count in report.passed_over.most_common())
        text = f"{report.name}: {report.passed_over.total() + used:,} regions read: {used:,} can be used{reasons}"
        yield Finding(WARNING, "data", text, "mend them, or leave it: their images are used all the same")
    for reason, message in report.messages.items():
        yield Finding(NOTE, "data", f"first {reason}: {message}")


def expected_counts(source: Reader) -> Iterator[Finding]:
    """Compare RefCOCO's splits with the release; other sizes are worth knowing, no fault."""
    if not isinstance(source, RefCoco):
        return
    for label, counts in source.split_counts().items():
        for split, (images, refs) in counts.items():
            text = f"{label} {split}: {refs:,} references on {images:,} images"
            want_images, want_refs = EXPECTED.get((label.partition(":")[0], split), (None, None))
            if want_refs is None:
                yield Finding(NOTE, "data", text)
            elif refs == want_refs and want_images in (None, images):
                yield Finding(OK, "data", f"{text}, as released")
            else:
                yield Finding(NOTE, "data", f"{text}; the release has {want_refs:,} references")


def check_leakage(sources: Sequence[Reader], data: DataConfig, *, by_sight: bool) -> tuple[list[Finding], list[Leak]]:
    """Look for held-out images among the training data, by id and, if asked, by sight."""
    held_out = held_out_of(data)
    if not held_out:
        return [Finding(NOTE, "leakage", "no held-out RefCOCO split is at hand to compare with")], []
    findings: list[Finding] = []
    leaks: list[Leak] = []
    for source in sources:
        by_id = {leak.entry: leak for leak in leaked_by_id(source, held_out)}
        seen, looked_at = leaked_by_sight(source, list(held_out.values()), LOOKED_AT) if by_sight else ([], 0)
        own = [*by_id.values(), *(leak for leak in seen if leak.entry not in by_id)]
        how = f"by id, {looked_at:,} of {len(source):,} by sight" if by_sight else "by id"
        if own:
            shown = f"{len(own)} of {len(source):,} entries show held-out images ({how}), such as {own[0]}"
            fix = "remove these files; --leakage_guard drop leaves out those that an id tells"
            findings.append(Finding(PROBLEM, "leakage", f"{source.name}: {shown}", fix))
        else:
            findings.append(Finding(OK, "leakage", f"{source.name}: no held-out image ({how})"))
        leaks += own
    return findings, leaks


def check_captions(config: Config, sources: Sequence[Reader] = ()) -> Iterator[Finding]:
    """Look for captions where a reward, or the anchor of the language, needs them; ``sources`` that were opened."""
    data = config.data
    captioned = [one.num_captioned for one in sources if isinstance(one, MasksDir)]
    has_captions = data.refcoco_dir is not None or (any(captioned) if captioned else data.masks_dir is not None)
    has_captions = has_captions or (data.class_captions == "reference" and any(one.has_class_names for one in sources))
    if config.reward.caption_weight > 0 and not has_captions:
        fix = "give --refcoco_dir or captioned --masks_dir, or set --caption_reward_weight 0"
        yield Finding(PROBLEM, "captions", "the caption reward is on and no data set has captions", fix)
    elif not has_captions:
        fix = "mix in --refcoco_dir, or watch `frozen_cycle_iou` and `kl`"
        text = "no data set has captions: nothing keeps the language of step 1 in place but the start"
        yield Finding(WARNING, "captions", text, fix)
    else:
        yield Finding(OK, "captions", "captions anchor the language of step 1")
