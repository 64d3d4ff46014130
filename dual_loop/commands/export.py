"""``dual-loop export RUN OUT``: a run's weights into files of other programs, read back before they count.

Reads the run folder alone: its configuration, its checkpoint, and the sources that its weights started from.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop.checkpoint import FORMATS
from dual_loop.commands.common import Command
from dual_loop.config import Config, add_trust_flag, in_cache, load_config
from dual_loop.config.words import HUB
from dual_loop.errors import CheckpointError, DualLoopError, EnvironmentProblem, explain, listed, shorten, writing

if TYPE_CHECKING:
    from torch import Tensor

    from dual_loop.model.prompts import Prompter
    from dual_loop.model.sa2va import Sa2VA

MARK = "export.json"
"""In every exported folder: its format and its files, so that nothing else is replaced with them."""
PROBE_TEXT = "the object on the left"
PROBE_TOKENS = 16
TOLERANCE_MERGED = {"float32": 1e-2, "bfloat16": 1.0}
"""Largest difference of mask logits after LoRA was folded in, by the dtype that the sum was rounded to."""


@dataclass
class Probe:
    """What a model says and draws for one fixed image: generated ids, and mask logits (Q, Q) for a fixed text."""

    caption_ids: list[int]
    caption: str
    mask_logits: Tensor


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run", type=Path, help="run folder, or one checkpoint folder inside it")
    parser.add_argument("out", type=Path, help="folder, or a .pth file for the original formats")
    parser.add_argument("--format", dest="file_format", metavar="|".join(FORMATS), required=True)
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument("--merge_lora", action="store_true", help="fold LoRA into its base (always so for hf-*)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as trained")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="size of a shard in 10^9 bytes (default: 5)")
    text = "checkpoint to take the video-memory tensors from"
    parser.add_argument("--video_weights", type=in_cache, metavar=f"PATH|{HUB}", help=text)
    add_trust_flag(parser)
    text = "upload the folder to huggingface.co, private unless --public is given; says first what, and how large it is"
    parser.add_argument("--push_to_hub", metavar=HUB, help=text)
    parser.add_argument("--public", action="store_true", help="whoever finds it can read what --push_to_hub uploads")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")


def _export(args: argparse.Namespace) -> int:
    """Export, read back, compare.

    Raises:
        CheckpointError: nothing to export, OUT exists, or what was read back differs.
    """
    import torch

    from dual_loop.checkpoint.exporter import MERGED, check_target, export_weights
    from dual_loop.checkpoint.importer import weights_sources
    from dual_loop.evaluation.model_card import model_card
    from dual_loop.evaluation.report import RunRecord, read_run
    from dual_loop.model.adapters import trainable_table
    from dual_loop.serve.loading import fill, find_run, rebuild

    out: Path = args.out
    check_target(out, args.file_format, args.merge_lora)
    if args.public and not args.push_to_hub:
        raise CheckpointError(explain("nothing is published", "--public", expected=f"--push_to_hub {HUB} beside it"))
    if args.push_to_hub:
        check_push(args.push_to_hub, out)
    if os.path.lexists(out) and not args.overwrite:
        raise CheckpointError(explain("the target exists", str(out), fix="choose another name or give --overwrite"))
    failed = out.with_name(f"{out.name}.failed")
    check_replaceable(out)
    check_replaceable(failed)
    folder, checkpoint = find_run(args.run)
    config = load_config(folder / "config.json")
    sources = weights_sources(config)
    model, prompter = rebuild(config, sources)
    fill(model, checkpoint, args.weights)
    video = find_video(folder, sources, args.video_weights) if args.file_format in ("original", "hf-sa2va") else {}
    before = probe(model, prompter, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent)
    with writing("the export", out, net=True), hidden as place:
        temporary = Path(place) / out.name  # its suffix says what is in it
        count = export_weights(
            model,
            temporary,
            args.file_format,
            config,
            prompter.tokenizer,
            video=video,
            merge_lora=args.merge_lora,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            max_shard_bytes=int(args.max_shard_gb * 1e9),
        )
        if temporary.is_dir():
            try:
                run = read_run(folder)
            except CheckpointError as error:
                print(f"note: the model card lacks what the run says of itself: {error}")
                run = RunRecord(folder, config=config.to_dict())
            which = f"{checkpoint.name}, {'averaged' if args.weights == 'ema' else 'last'} weights"
            card = model_card(run, config, sources, trainable_table(model), args.file_format, which)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            files = [str(file.relative_to(temporary)) for file in sorted(temporary.rglob("*")) if file.is_file()]
            (temporary / MARK).write_text(json.dumps({"format": args.file_format, "files": files}, indent=1))
        source = f"{args.file_format} from {checkpoint.name} ({args.weights})"
        print(f"wrote {count:,} tensors as {source}, {len(video)} of them video memory")
        # One model at a time: two of the real size would not fit.
        del model
        gc.collect()
        # Mask logits may differ where LoRA was folded in or values were cast.
        may_differ = args.merge_lora or args.file_format in MERGED or args.dtype == "bfloat16"
        stored = config.model.dtype if args.dtype == "auto" else args.dtype
        allowed = TOLERANCE_MERGED[stored] if may_differ else 0.0
        read_back(temporary, args.file_format, config, sources, before, allowed, failed)
        remove(out)
        temporary.rename(out)
    if args.file_format in ("adapter", "original-trimmed"):
        base = [f"--model_path {path}" if path.is_dir() else f"--sam2_path {path}" for path in sources]
        print(f"note: under it belongs what the run started from: {' '.join(base)}")
    if args.file_format == "hf-sa2va":
        print("note: the release's own .py files belong beside config.json; copy them from its folder")
    print(f"exported to {out}")
    if args.push_to_hub:
        push(out, args.push_to_hub, args.public)
    return 0


def check_push(name: str, out: Path) -> None:
    """Look at what can be known before an export that is to be uploaded; the hub is not asked.

    Raises:
        CheckpointError: a file, or a name that no hub gives.
        EnvironmentProblem: nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from dual_loop.checkpoint.exporter import FILE_SUFFIXES

    if out.suffix in FILE_SUFFIXES:
        raise CheckpointError(explain("a file is not uploaded", str(out), expected="a folder, with its model card"))
    try:
        validate_repo_id(name if "/" in name else "")
    except HFValidationError as error:
        raise CheckpointError(explain("no name of a hub", "--push_to_hub", name, HUB)) from error
    if get_token() is None:
        raise EnvironmentProblem(explain("nobody is logged in at the hub", "--push_to_hub", fix="hf auth login"))


def push(folder: Path, name: str, is_public: bool) -> None:
    """Upload an exported folder, after a line that says what and how large it is.

    Raises:
        EnvironmentProblem: it failed, or the model is public there and ``is_public`` is false; the folder stays.
    """
    from huggingface_hub import HfApi

    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    size, kind = sum(file.stat().st_size for file in files) / 1e6, "public" if is_public else "private"
    shown = listed([file.relative_to(folder) for file in files])
    print(f"uploading {len(files)} files, {size:,.1f} MB, to {name} ({kind}): {shown}", flush=True)
    api, flag = HfApi(), "" if is_public else " --private"
    fix = f"hf upload {name} {shlex.quote(str(folder))}{flag}"
    try:
        api.create_repo(name, private=not is_public, exist_ok=True)
        if not is_public and not api.model_info(name).private:  # it was there before
            raise EnvironmentProblem(explain("the model is public", name, fix="give --public, or another name"))
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an export of dual_loop")
    except DualLoopError:
        raise
    except Exception as error:  # of the network, the hub, the disk
        what = "the upload failed; the export is whole"
        raise EnvironmentProblem(explain(what, str(folder), shorten(error), fix=fix)) from error
    print(f"uploaded to {done.commit_url}")


def check_replaceable(path: Path) -> None:
    """Look whether ``path`` is free, or an export alone, which another export may replace.

    Raises:
        CheckpointError: something else is there; the message names it.
    """
    import torch

    from dual_loop.checkpoint.exporter import FILE_MARK

    if not os.path.lexists(path):
        return
    foreign = "no file that an export wrote"
    if path.is_dir() and not path.is_symlink():
        found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
        with suppress(OSError, ValueError, KeyError, TypeError):
            found -= {MARK, *json.loads((path / MARK).read_text(encoding="utf-8"))["files"]}
        foreign = listed(sorted(found))
    elif path.is_file() and not path.is_symlink():
        with suppress(Exception):  # whatever a file can make of torch: it is none of ours then
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            foreign = "" if FILE_MARK in content["meta"] else foreign
    if foreign:
        what, fix = "what is there was not written by an export, and is not replaced", "choose another name, or move it"
        raise CheckpointError(explain(what, str(path), foreign, "an earlier export alone", fix))


def find_video(folder: Path, sources: Sequence[Path], given: str | None) -> dict[str, Tensor]:
    """Return the video-memory tensors from ``--video_weights``, else from the sources of the run.

    Raises:
        CheckpointError: the run's sources had such tensors when it started, and no longer do.
    """
    from dual_loop.checkpoint.exporter import collect_video

    paths: list[str | Path] = [given] if given is not None else [path for path in sources if path.exists()]
    found = collect_video(paths)
    if found:
        return found
    report = folder / "import_report.json"
    listed = json.loads(report.read_text(encoding="utf-8"))["sources"] if report.is_file() else []
    expected = sum(sum(source["dropped"].values()) for source in listed)
    if expected or given is not None:
        what, where = "the video-memory tensors are not found", ", ".join(map(str, paths)) or "no source"
        wanted = f"{expected or 'some'} tensors (memory attention, memory encoder, object pointers)"
        fix = "give --video_weights PATH, a Sa2VA or SAM 2 checkpoint that has them"
        raise CheckpointError(explain(what, where, expected=wanted, fix=fix))
    print("note: the run's sources hold no video memory, so none is written; tools for video will miss it")
    return {}


def probe(model: Sa2VA, prompter: Prompter, config: Config) -> Probe:
    """Caption one region of a generated image, and segment it by a fixed text."""
    import torch

    from dual_loop.data.prepare import batch_from_samples
    from dual_loop.loop.captioner import Captioner, measuring_settings
    from dual_loop.loop.scorer import Scorer
    from dual_loop.model.build import geometry
    from dual_loop.model.hardware import autocast
    from dual_loop.model.sa2va import evaluating
    from dual_loop.serve.predictor import region_sample
    from dual_loop.testing.scenes import generate_scene

    scene = generate_scene(123)
    sample = region_sample(scene.image, scene.masks)
    loop = dataclasses.replace(measuring_settings(config.loop), max_new_tokens=PROBE_TOKENS)
    with evaluating(model), torch.no_grad(), autocast(model.device.type, config.model.dtype):
        batch = batch_from_samples([sample], geometry(config), seed=0).to(model.device)
        seen = model.see(batch)
        [[caption, *_]] = Captioner(model, prompter, loop).write([seen], [batch])
        [logits] = Scorer(model, prompter, loop).segment(batch, seen, [(0, PROBE_TEXT)])
    return Probe(list(caption.token_ids), caption.text, logits[0].float().cpu())


def read_back(
    path: Path, file_format: str, config: Config, sources: Sequence[Path], before: Probe, allowed: float, kept: Path
) -> None:
    """Import what was written into a new model and compare what it says and draws.

    Raises:
        CheckpointError: the caption differs, or mask logits differ by more than ``allowed``; ``kept`` gets the files.
    """
    from dual_loop.serve.loading import rebuild

    started = time.perf_counter()
    over = file_format in ("original-trimmed", "adapter")
    model, prompter = rebuild(config, [*sources, path] if over else [path])
    after = probe(model, prompter, config)
    difference = float((after.mask_logits - before.mask_logits).abs().max())
    same = after.caption_ids == before.caption_ids
    line = f"read back in {time.perf_counter() - started:.0f} s: caption {'identical' if same else 'DIFFERENT'} "
    line += f"({before.caption!r}), largest mask logit difference {difference:.2e} (tolerance {allowed:g})"
    print(line)
    if not same or not difference <= allowed:
        remove(kept)
        path.rename(kept)
        expected, fix = "the same caption and mask", "do not use these files"
        raise CheckpointError(explain("what was read back differs", str(kept), line, expected, fix))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


main = Command("export", "Write a run's weights for other programs.", _add_arguments, _export)
