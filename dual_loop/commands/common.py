"""What the commands share: their shape, their arguments, and measuring over all ranks.

Nothing here imports torch before a command runs, so that every ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop import __version__
from dual_loop.config import (
    SETTINGS,
    Config,
    DataConfig,
    add_data_flags,
    add_trust_flag,
    in_cache,
    load_config,
    overrides_from,
)
from dual_loop.config.derived import has_held_out_masks
from dual_loop.config.words import HUB
from dual_loop.data.names import DEFAULT_SPLIT_BY, EVAL_SETS, SETTING_PREFIX, VIDEO_SETS, check_name
from dual_loop.errors import ConfigError, DualLoopError, did_you_mean, explain, writing
from dual_loop.iteration import QUIET

if TYPE_CHECKING:
    from dual_loop.data.reader import Reader
    from dual_loop.evaluation.figures import DataFigures
    from dual_loop.evaluation.measure import BestOf, MeasuredRegion
    from dual_loop.evaluation.protocols import Protocol
    from dual_loop.evaluation.runner import MeasuredData, SkippedEntry

REGIONS_PER_IMAGE = 16
NO_EVALUATION = {
    "train.eval_strategy": "ends",
    **dict.fromkeys(("train.eval_interval", "train.keep_best", "train.patience")),
}
"""Of a run that is measured afterwards: these ask for a held-out set, which may be left out now."""
DEFAULT_CHECKPOINT = "run folder, checkpoint, or weights (default: the tiny checkpoint in the package)"


class _Parser(argparse.ArgumentParser):
    """One that knows what an unknown flag may have been meant to be."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        found, left = self.parse_known_args(args, namespace)
        if left:
            flags = [word.partition("=")[0] for word in left if word.startswith("--")]
            near = "\n  ".join(word + did_you_mean(word, self._option_string_actions) for word in flags)
            fix = "" if flags else "; numbers that belong together have commas and no spaces between them"
            self.error(f"unrecognized arguments: {near or ' '.join(left)}{fix}")
        return found


@dataclass(frozen=True)
class Command:
    """A command: call it with its arguments (those of the process by default) and it returns its exit status.

    Attributes:
        name: what stands behind ``dual-loop``.
        description: first lines of its ``--help``.
        add_arguments: gives its parser what it reads; told the arguments, because ``--help`` may depend on them.
        run: does it and returns the status; a :class:`DualLoopError` becomes status 2 and a line that begins with
            ``error:``.
        usage, example: of its ``--help``; the usage is made from the arguments where there is none.
    """

    name: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser, Sequence[str]], None]
    run: Callable[[argparse.Namespace], int]
    usage: str | None = None
    example: str | None = None

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        parser = _Parser(
            allow_abbrev=False,
            prog=f"dual-loop {self.name}",
            usage=self.usage and f"%(prog)s {self.usage}",
            description=self.description,
            epilog=self.example and f"example: {self.example}",
        )
        self.add_arguments(parser, arguments)
        add_quiet(parser, default=False)
        try:
            args = parser.parse_args(arguments)
            if not args.quiet and os.environ.get("RANK", "0") == "0":  # torch takes seconds until the next line
                print(f"dual-loop {__version__}: {self.name}", file=sys.stderr, flush=True)
            with writing("a file", "", net=True), _speaking(args.quiet):
                return self.run(args)
        except DualLoopError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("error: stopped by Ctrl-C before there was anything to save", file=sys.stderr, flush=True)
            return 130


def add_quiet(parser: argparse.ArgumentParser, default: object = argparse.SUPPRESS) -> None:
    """Add ``--quiet``; without a default to the parser of a command below one that has it."""
    parser.add_argument("--quiet", action="store_true", default=default, help="print warnings and errors alone")


@contextmanager
def _speaking(quiet: bool) -> Iterator[None]:
    """Print the package's warnings on a line each; where ``quiet``, no bars and nothing but what goes to stderr."""
    usual, package = warnings.formatwarning, str(Path(__file__).parents[1])

    def on_a_line(message, category, filename, *more, **further):  # type: ignore[no-untyped-def]
        is_own = filename.startswith(package)
        return f"warning: {message}\n" if is_own else usual(message, category, filename, *more, **further)

    warnings.formatwarning = on_a_line
    try:
        with ExitStack() as stack:
            if quiet:
                os.environ[QUIET] = "1"  # for processes that are started, too
                stack.callback(os.environ.pop, QUIET)
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        warnings.formatwarning = usual


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names the model that is to answer."""
    group = _add_how_it_is_loaded(parser)
    group.add_argument("--checkpoint", metavar=f"PATH|{HUB}", help=DEFAULT_CHECKPOINT)
    group.add_argument("--max_new_tokens", type=int, metavar="TOKENS", help="longest caption (default: the config's)")
    group.add_argument("--max_tiles", type=int, metavar="TILES", help="most tiles of an image (default: the config's)")


def add_measuring_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what is measured, on which data, and where the result goes: by default into ``name`` inside the run."""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=DEFAULT_CHECKPOINT)
    text = (
        "what to measure: refcoco:val, refcoco+:testA, refcocog:test (under --refcoco_dir or --eval_dir), "
        "sav, sa1b, openimages, masks (their folders), an evaluation set of the field under --eval_dir "
        f"({', '.join(EVAL_SETS)}), or a .parquet file of references (default: what the run holds "
        "out, else what it trains on)"
    )
    parser.add_argument("--data", nargs="+", type=check_name, default=[], metavar="NAME", help=text)
    parser.add_argument("--max_samples", type=int, metavar="IMAGES", help="take so many entries of each data set")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help=f"default: CHECKPOINT/{name}")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier one has left there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    text = "a run or weights that were trained apart from the same start: captions are also heard by these"
    _add_how_it_is_loaded(parser).add_argument("--listener", type=in_cache, metavar=f"PATH|{HUB}", help=text)
    add_data_flags(parser)


def _add_how_it_is_loaded(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model")
    group.add_argument("--weights", choices=("ema", "live"), default="ema", help="of a run: averaged or last")
    text = "of weights that are no run (default: tiny_cpu); a Python file is RUN: give none that you do not trust"
    group.add_argument("--config", metavar="FILE|NAME", help=text)
    add_trust_flag(group)
    text = "base model: its tokenizer, and its weights under an adapter or a trimmed checkpoint"
    group.add_argument("--model_path", metavar=f"DIR|{HUB}", help=text)
    text = "SAM 2 weights under a checkpoint that lacks them"
    group.add_argument("--sam2_path", metavar=f"PATH|{HUB}", help=text)
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return group


def overrides_of(args: argparse.Namespace, max_tiles: int | None = None) -> dict[str, object]:
    """Return the settings that the flags name; up to 16 regions of an image, unless a flag says otherwise.

    ``max_tiles`` is what ``--max_tiles auto``, the default, means; None leaves it to the configuration.
    """
    settings: dict[str, object] = {"data.regions_per_image": REGIONS_PER_IMAGE, **overrides_from(args)}
    if settings.get("data.max_tiles", "auto") == "auto":
        settings["data.max_tiles"] = max_tiles
    given = {key: value for key, value in settings.items() if value is not None}
    for prefix in SETTING_PREFIX.values():
        if f"data.{prefix}_dir" in given:
            # What a run took of its folder, and where its images lay, says nothing of another folder.
            others = (f"data.{prefix}_{part}" for part in ("max_samples", "images"))
            given |= {key: None for key in others if key in SETTINGS and key not in given}
    return given


def describe_origin(origin: Mapping[str, str]) -> str:
    """Return which weights were measured, on one line."""
    parts = [origin[key] for key in ("path", "hub", "checkpoint", "weights") if key in origin]
    return " ".join([*parts, *([f"sha256 {origin['sha256'][:16]}"] if "sha256" in origin else [])])


def write_page(page: str, path: Path) -> None:
    """Write an HTML page and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{path} ({len(page) / 1e6:.1f} MB)")


@dataclass(frozen=True)
class Measured:
    """What rank 0 has in hand when every rank has measured; ``header`` says what, with which weights, as JSON."""

    folder: Path
    header: Mapping[str, object]
    protocol: Protocol
    weights: str
    data: list[MeasuredData]
    config: Config
    regions: dict[str, list[MeasuredRegion]]
    skipped: list[SkippedEntry]

    def figures(self, tasks: Sequence[str]) -> dict[str, DataFigures]:
        """Return the figures of every data set that has regions.

        Raises:
            ConfigError: none has.
        """
        from dual_loop.evaluation.figures import figures_of

        figures = {name: figures_of(own, tasks) for name, own in self.regions.items() if own}
        if not figures:
            seen = self.skipped[0]["message"] if self.skipped else "the data sets are empty"
            what, fix = "no region was measured", "check --data and its folders"
            raise ConfigError(explain(what, str(self.folder), seen, fix=fix))
        return figures

    def finish(self, name: str, result: Mapping[str, object]) -> str:
        """Write the result, which is returned as JSON, say what was skipped, and remove the parts.

        A second start needed these until now.
        """
        from dual_loop.evaluation.runner import PARTS
        from dual_loop.training.run_folder import versions, write_json

        document = {**self.header, "versions": versions(), **result, "skipped": self.skipped}
        write_json(self.folder / name, document)
        for one in self.data:
            if one.trained_on:
                print(f"note: the run trained on these entries of {one.name}: its figures are no test", file=sys.stderr)
        for entry in self.skipped:
            print(f"skipped {entry['data']}/{entry['entry']}: {entry['message']}", file=sys.stderr)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return json.dumps(document, indent=2)


def measure(
    args: argparse.Namespace,
    name: str,
    protocol: Protocol,
    tasks: Sequence[str],
    best_of: BestOf | None = None,
) -> Measured | None:
    """Load the checkpoint and measure this rank's share of the data; return everything on rank 0, None elsewhere.

    Args:
        args: of :func:`add_measuring_arguments`.
        name: of the default output folder (inside the run, else in ``outputs/``) and of the progress bar.
        best_of: says how likely captions are, and may take better ones.

    Raises:
        DualLoopError: the checkpoint, the data or the folder cannot be used.
    """
    from dual_loop.evaluation import runner
    from dual_loop.evaluation.clip_meter import ClipMeter, build_tracker
    from dual_loop.evaluation.measure import RegionMeter
    from dual_loop.model.adapters import trainable_parameters
    from dual_loop.model.stored_weights import StoredWeights, weights
    from dual_loop.serve.loading import find_trained
    from dual_loop.training import ranks
    from dual_loop.training.devices import build_accelerator, end_processes
    from dual_loop.training.listeners import read_listener
    from dual_loop.training.setup import describe_start, fingerprint
    from dual_loop.training.trainer import memory_errors_explained

    settings = {**NO_EVALUATION, **overrides_of(args, protocol.max_tiles)}
    if "data.masks_dir" in settings:  # a folder that is named is measured whole, whatever share the run holds out
        settings = {"data.eval_masks_dir": None, "data.val_fraction": 0.0, **settings}
    found = find_trained(args.checkpoint, weights=args.weights, config=args.config, overrides=settings)
    config, folder = found.config, args.output_dir
    protocol = protocol.with_tiles(config.data.max_tiles)
    if folder is None:
        is_run = args.checkpoint is not None and (Path(args.checkpoint) / "config.json").is_file()
        folder = Path(args.checkpoint if is_run else "outputs") / name
    accelerator = build_accelerator(config)
    with ranks.failing_together(), memory_errors_explained(name):
        ranks.compare(describe_start(config))
        learnt = load_config(found.saved.parents[1] / "config.json").data if found.saved else None
        data = open_measured(
            args.data, config.data, limit=args.max_samples, polygons=protocol.polygons, trained_on=learnt
        )
        loaded = found.load(accelerator.device)
        is_main, rank, world_size = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
        header = {
            "checkpoint": loaded.origin,
            "data": [one.description() for one in data],
            "tasks": list(tasks),
            "protocol": protocol.to_dict(),
            "max_new_tokens": config.loop.max_new_tokens,
        }
        listener = None
        if args.listener is not None:
            values = read_listener(args.listener, loaded.model, loaded.prompter, config)
            listener = partial(weights, StoredWeights(trainable_parameters(loaded.model), values))
            header["listener"] = f"{args.listener}: {fingerprint(Path(args.listener))}"
        if best_of is not None:
            header["best_of"] = asdict(best_of)
        ranks.compare({**header, "output_dir": folder})
        if is_main or not args.overwrite:
            runner.start(folder, header, is_main, args.overwrite)
        accelerator.wait_for_everyone()
        parts, autocast = (loaded.model, loaded.prompter, config, protocol), loaded.autocast()
        if "video" in tasks:
            tracker = build_tracker(loaded.model, config, found.sources, is_silent=not is_main)
            own: Callable[..., list[MeasuredRegion]] = ClipMeter(*parts, tracker, folder, autocast).measure
        else:
            own = RegionMeter(*parts, tasks, autocast, independent_listener=listener, best_of=best_of).measure
        runner.measure_chunks(folder, data, own, config.train.seed, rank, world_size, name)
        accelerator.wait_for_everyone()
        # From here on rank 0 works alone, on files.
        end_processes(accelerator)
    if not is_main:
        return None
    regions, skipped = runner.join(folder, data)
    header = {**header, "world_size": world_size}
    return Measured(folder, header, protocol, describe_origin(loaded.origin), data, config, regions, skipped)


def open_measured(
    names: Sequence[str],
    data: DataConfig,
    *,
    limit: int | None = None,
    polygons: str = "union",
    trained_on: DataConfig | None = None,
) -> list[MeasuredData]:
    """Open the data sets called ``names``; with none, what the settings hold out, else all that they give.

    ``masks`` are those that are held out of the own ones, where some are. ``limit`` is the most entries of a data set,
    ``polygons`` how RefCOCO's are joined, ``trained_on`` what the run that is measured has learnt from.

    Raises:
        ConfigError: a name is unknown, its folder is not given, or nothing is there.
    """
    from dual_loop.data.dataset_builder import open_source
    from dual_loop.data.eval_sets import EvalSetReader
    from dual_loop.data.limits import use_limits
    from dual_loop.data.ref_parquet import RefParquet
    from dual_loop.data.ref_video import RefVideos
    from dual_loop.data.refcoco import RefCoco
    from dual_loop.evaluation.runner import MeasuredData, held_out_masks

    use_limits(data)
    has_own = has_held_out_masks(data)
    fields = {name: f"{prefix}_dir" for name, prefix in SETTING_PREFIX.items() if name != "refcoco"}

    def open_one(name: str) -> Reader:
        dataset, _, split = check_name(name).partition(":")
        if name.endswith(".parquet"):
            return RefParquet(name, data.refcoco_images, polygons)
        if dataset in EVAL_SETS:
            if data.eval_dir is None:
                raise ConfigError(explain("the folder of a data set is not given", name, fix="set --eval_dir"))
            if dataset in VIDEO_SETS:
                return RefVideos(dataset, data.eval_dir, split or EVAL_SETS[dataset][0])
            return RefParquet(data.eval_dir) if dataset == "refcoco-m" else EvalSetReader(dataset, data.eval_dir, split)
        if dataset in DEFAULT_SPLIT_BY:
            root = data.refcoco_dir or data.eval_dir
            if root is None:
                raise ConfigError(explain("the folder of a data set is not given", name, fix="set --refcoco_dir"))
            return RefCoco(
                root,
                datasets=(dataset,),
                split=split or data.eval_split,
                images=data.refcoco_images,
                index_dir=data.index_dir,
                polygons=polygons,
            )
        own = replace(data, sav_frames=2, region_choice="random")
        if dataset == "masks" and has_own:
            return held_out_masks(own)
        if getattr(data, fields[dataset]) is None:
            raise ConfigError(explain("the folder of a data set is not given", name, fix=f"set --{fields[dataset]}"))
        return open_source(dataset, own)

    def is_trained_on(name: str) -> bool:
        dataset, _, split = name.partition(":")
        field = "refcoco_dir" if dataset in DEFAULT_SPLIT_BY else fields.get(dataset)
        if trained_on is None or field is None or (dataset == "masks" and has_own):
            return False
        if field == "refcoco_dir" and (split or data.eval_split) != trained_on.refcoco_split:
            return False
        learnt, measured = getattr(trained_on, field), getattr(data, field)
        return learnt is not None and Path(learnt).resolve() == Path(measured or "").resolve()

    wanted = list(names)
    if not wanted:
        wanted = [f"{name}:{data.eval_split}" for name in data.eval_datasets if data.eval_dir is not None]
        wanted += ["masks"] * has_own
    if not wanted:
        wanted = [name for name, field in fields.items() if getattr(data, field) is not None]
        if data.refcoco_dir is not None:
            present = [n for n in data.refcoco_datasets if (Path(data.refcoco_dir) / n.partition(":")[0]).is_dir()]
            wanted += [f"{name}:{data.refcoco_split}" for name in present]
    if not wanted:
        raise ConfigError(explain("no data set is given", "--data", fix="give --data and the folder of that data set"))
    return [MeasuredData(name, open_one(name), limit, is_trained_on(name)) for name in dict.fromkeys(wanted)]
