"""What commands share: the shape, and the names of data sets to measure."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dual_loop import __version__
from dual_loop.commands import common
from dual_loop.commands.common import (
    Command,
    add_measuring_arguments,
    describe_origin,
    open_measured,
    overrides_of,
)
from dual_loop.config import DataConfig, load_config, resolve_config_path
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError
from dual_loop.iteration import QUIET, progress_bar
from dual_loop.testing.demo_data import write_demo_data


def test_a_command_reads_runs_and_reports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def add(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        parser.add_argument("number", type=int, help=f"told {len(argv)} arguments")

    def run(args: argparse.Namespace) -> int:
        if args.number < 0:
            raise ConfigError("less than nothing")
        return int(args.number)

    command = Command("count", "Count.", add, run, usage="NUMBER", example="dual-loop count 3")
    assert command(["3"]) == 3
    assert command(["--", "-1"]) == 2
    assert capsys.readouterr().err == f"dual-loop {__version__}: count\n" * 2 + "error: less than nothing\n"
    monkeypatch.setattr("sys.argv", ["x", "5"])
    assert command() == 5
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("usage: dual-loop count NUMBER", "Count.", "told 1 arguments", "example: dual-loop count 3"):
        assert part in text
    with pytest.raises(SystemExit) as caught:
        command(["three"])
    assert caught.value.code == 2


def test_a_command_can_be_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    def run(args: argparse.Namespace) -> int:
        with progress_bar("counting", "number") as bar:
            print("text", not bar.disable, QUIET in os.environ)
        for place in (Path(common.__file__), Path(np.__file__)):
            sys.stderr.write(warnings.formatwarning("odd", UserWarning, str(place), 1, ""))
        return 3

    command = Command("count", "Count.", lambda parser, argv: None, run)
    assert (command([]), command(["--quiet"])) == (3, 3)
    shown = f"warning: odd\n{np.__file__}:1: UserWarning: odd\n"
    assert capsys.readouterr() == ("text True False\n", f"dual-loop {__version__}: count\n{shown}{shown}")


def test_weights_on_one_line() -> None:
    assert describe_origin({"path": "a folder"}) == "a folder"
    origin = {"path": "run", "checkpoint": "step_3", "weights": "ema", "sha256": "0123456789abcdef" * 4}
    assert describe_origin(origin) == "run step_3 ema sha256 0123456789abcdef"


def test_flags_become_settings() -> None:
    parser = argparse.ArgumentParser()
    add_measuring_arguments(parser, "audit")
    assert overrides_of(parser.parse_args([])) == {"data.regions_per_image": 16, "train.device": "auto"}
    arguments = ["run", "--model_path", "base", "--cfg-options", "data.regions_per_image=3", "train.seed=2"]
    settings = overrides_of(parser.parse_args(arguments))
    assert settings["train.model_path"] == "base"
    assert int(settings["data.regions_per_image"]) == 3
    assert int(settings["train.seed"]) == 2


def test_another_folder_is_not_cut_as_the_runs_was(tmp_path: Path) -> None:
    """A run on 60 of its images is measured on all of others; its own folder keeps its cap."""
    trained = {"masks_dir": "a", "masks_max_samples": 60, "masks_images": "i", "sa1b_dir": "b", "sa1b_max_samples": 5}
    (tmp_path / "config.json").write_text(json.dumps({"data": trained}))
    parser = argparse.ArgumentParser()
    add_measuring_arguments(parser, "evaluate")
    given = overrides_of(parser.parse_args(["run", "--masks_dir", "other"]))
    data = load_config(tmp_path / "config.json", given).data
    assert (data.masks_dir, data.masks_max_samples, data.masks_images, data.sa1b_max_samples) == (
        "other",
        None,
        None,
        5,
    )
    capped = overrides_of(parser.parse_args(["run", "--masks_dir", "other", "--masks_max_samples", "7"]))
    assert load_config(tmp_path / "config.json", capped).data.masks_max_samples == 7


def empty_data() -> DataConfig:
    return load_config(resolve_config_path("tiny_cpu")).data


def test_names_of_data_sets(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "demo", 2, 3, num_val=2)
    roots = {"sa1b_dir": "sa1b", "sav_dir": "sav", "refcoco_dir": "ref_seg"}
    settings = {f"data.{key}": str(tmp_path / "demo" / name) for key, name in roots.items()}
    settings["data.index_dir"] = str(tmp_path / "index")
    data = load_config(resolve_config_path("tiny_cpu"), settings).data
    given = open_measured([], data)
    assert [one.name for one in given] == ["sav", "sa1b", "refcoco:train"]
    held_out = load_config(resolve_config_path("tiny_cpu"), {**settings, "data.eval_dir": settings["data.refcoco_dir"]})
    assert "refcoco:val" in [one.name for one in open_measured([], held_out.data)]
    [val, again] = open_measured(["refcoco:val", "sa1b", "refcoco:val"], data, limit=1)
    assert isinstance(val.source, RefCoco)
    assert (len(val), again.name) == (1, "sa1b")
    names = ["sa1b", "refcoco:train", "refcoco:val", "refcoco"]
    learnt = open_measured(names, replace(data, sa1b_dir=f"{data.sa1b_dir}/"), trained_on=data)
    assert [one.trained_on for one in learnt] == [True, True, False, False]
    assert not open_measured(["sa1b"], data, trained_on=empty_data())[0].trained_on
    empty = empty_data()
    for names, message in (
        ([], "no data set is given"),
        (["coco"], "unknown data set"),
        (["sa1b:val"], "unknown data set"),
        (["sa1b"], "set --sa1b_dir"),
        (["refcoco:val"], "set --refcoco_dir"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_measured(names, empty)
