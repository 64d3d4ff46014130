"""The flag table: complete, valid, and converted by the typed configuration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from dual_loop.config import SETTINGS, add_training_flags, load_config, overrides_from, schema
from dual_loop.errors import ConfigError

PROMISED = (
    "config cfg-options pretrained_pth model_path output_dir sav_dir sa1b_dir openimage_dir refcoco_dir "
    "sa1b_max_samples sav_max_samples openimage_max_samples sav_repeats refcoco_repeats regions_per_image num_epochs "
    "max_steps batch_size gradient_accumulation_steps effective_batch learning_rate weight_decay max_grad_norm "
    "ema_decay lora_r lora_alpha num_workers log_interval save_interval seed resume"
)


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    add_training_flags(result)
    return result


def test_every_promised_flag_exists_and_shows_its_default(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    for name in PROMISED.split():
        assert f"--{name} " in text, name
    for about in SETTINGS.values():
        assert not about.flag or f"--{about.flag} {about.unit or '|'.join(about.choices)}" in text
    assert "default: 1e-05" in text
    assert "default: 0.999" in text


def test_flags_become_typed_values_and_win_over_options(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(
        [
            *("--batch_size", "3", "--learning_rate", "2e-4", "--sav_dir", "x", "--max_steps", "none"),
            *("--cfg-options", "train.batch_size=9", "data.refcoco_datasets=refcoco,refcocog"),
            "model.text.hidden_size=64",
        ]
    )
    config = load_config(None, overrides_from(args))
    assert config.train.batch_size == 3
    assert config.train.learning_rate == 2e-4
    assert config.train.max_steps is None
    assert config.data.sav_dir == "x"
    assert config.data.refcoco_datasets == ("refcoco", "refcocog")
    assert config.model.text["hidden_size"] == 64


def test_flags_that_were_not_given_leave_the_config_alone(parser: argparse.ArgumentParser) -> None:
    assert overrides_from(parser.parse_args([])) == {}


def test_wrong_flag_and_wrong_option_are_reported_together(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--batch_size", "two", "--cfg-options", "train.batchsize=2"])
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides_from(args))
    assert "train.batch_size: seen 'two'" in str(caught.value)
    assert "train.batchsize" in str(caught.value)


@pytest.mark.parametrize("option", ["train.seed", "seed=1"])
def test_malformed_options_are_named(option: str) -> None:
    with pytest.raises(ConfigError, match=r"group\.key=value"):
        overrides_from(argparse.Namespace(cfg_options=["train.seed=1", option]))


def test_options_keep_text_where_the_configuration_converts() -> None:
    given = ["train.output_dir=123", "model.vision.patch_size=[8, 8]", "model.vision={'a': 1}"]
    options = overrides_from(argparse.Namespace(cfg_options=given))
    assert options == {"train.output_dir": "123", "model.vision.patch_size": [8, 8], "model.vision": {"a": 1}}


@pytest.mark.parametrize(("config", "expected"), [("tiny_cpu", ("32", "12")), ("sa2va_4b_full", ("128", "128"))])
def test_help_shows_the_values_of_the_chosen_config(config: str, expected: tuple[str, str]) -> None:
    parser = argparse.ArgumentParser()
    add_training_flags(parser, ["--config", config, "--help"])
    text = " ".join(parser.format_help().split())
    rank, tokens = expected
    assert f"of the language model but the head (default: {rank})" in text
    assert f"longest caption (default: {tokens})" in text


def test_help_of_an_unknown_config_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        add_training_flags(argparse.ArgumentParser(), ["--help", "--config=tiny_gpu"])
    assert "did you mean tiny_cpu?" in capsys.readouterr().err


@pytest.fixture
def old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.RENAMED, "train.lr", "train.learning_rate")
    monkeypatch.setitem(schema.RENAMED, "vision.keywords", "model.vision")
    monkeypatch.setitem(schema.RENAMED, "--lr", "train.learning_rate")
    monkeypatch.setitem(schema.REMOVED, "speed.turbo", "it is always on")
    monkeypatch.setitem(schema.REMOVED, "--turbo", "it is always on")


@pytest.mark.usefixtures("old_names")
def test_old_keys_of_a_file_are_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"train": {"lr": 0.5}, "speed": {"turbo": true}, "vision": {"keywords": {"a": 1}}}')
    config = load_config(path, {"vision.keywords.b": 2})
    assert config.train.learning_rate == 0.5
    assert config.model.vision == {"a": 1, "b": 2}
    [record] = caplog.records
    for part in ("train.lr is now train.learning_rate", "speed.turbo is gone and ignored (it is always on)"):
        assert part in record.getMessage()
    assert load_config(path, {"train.learning_rate": 0.25}).train.learning_rate == 0.25


@pytest.mark.usefixtures("old_names")
def test_old_flags_and_options_are_read_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    assert "--lr " not in parser.format_help()
    args = parser.parse_args(["--lr", "0.5", "--turbo", "yes", "--cfg-options", "speed.turbo=False"])
    assert load_config(None, overrides_from(args)).train.learning_rate == 0.5
    [record] = caplog.records
    assert "--lr is now --learning_rate; --turbo is gone" in record.getMessage()
    assert "speed.turbo is gone" in record.getMessage()


def test_settings_of_today_are_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_config(None, {"train.seed": 1})
    assert caplog.records == []


def test_a_json_file_is_data_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    (tmp_path / "base.py").write_text("raise SystemExit(9)")
    path.write_text('{"_base_": ["base.py"], "train": {"output_dir": "{{$HOME:x}}"}}')
    with pytest.raises(ConfigError, match="unknown key '_base_'"):
        load_config(path)
    path.write_text('{"train": {"output_dir": "{{$HOME:x}}"}}')
    assert load_config(path).train.output_dir == "{{$HOME:x}}"


@pytest.mark.parametrize(("text", "expected"), [("[1]", "not a configuration"), ("{", "cannot be read")])
def test_a_json_file_that_holds_no_settings_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_paths_of_a_run_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there / "run", there / "masks", there / "both", here / "both"):
        folder.mkdir(parents=True)
    data = {"masks_dir": "masks", "sa1b_dir": "both", "sav_dir": "gone", "eval_split": "masks"}
    (there / "run/config.json").write_text(json.dumps({"data": data}))
    (there / "run/versions.json").write_text(json.dumps({"started_in": str(there)}))
    monkeypatch.chdir(here)
    found = load_config(there / "run/config.json").data
    assert found.masks_dir == str(there / "masks")
    assert (found.sa1b_dir, found.sav_dir, found.eval_split) == ("both", "gone", "masks")
    for text in ("[]", "{}", '{"started_in": 3}', "{", '{"started_in": null}'):
        (there / "run/versions.json").write_text(text)
        assert load_config(there / "run/config.json").data.masks_dir == "masks"
