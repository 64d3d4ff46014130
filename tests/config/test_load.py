"""The flag table: complete, valid, and converted by the typed configuration."""

from __future__ import annotations

import argparse

import pytest

from dual_loop.config import (
    add_training_flags,
    all_flags,
    check_table,
    default_of,
    load_config,
    overrides_from,
    parse_options,
)
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


def test_table_names_only_keys_of_the_configuration() -> None:
    assert check_table() == []


def test_every_promised_flag_exists_and_shows_its_default(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    for name in PROMISED.split():
        assert f"--{name} " in text, name
    for flag in all_flags():
        assert f"--{flag.name} {flag.unit}" in text
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
        parse_options(["train.seed=1", option])


def test_options_keep_text_where_the_configuration_converts() -> None:
    options = parse_options(["train.output_dir=123", "model.vision.patch_size=[8, 8]", "model.vision={'a': 1}"])
    assert options == {"train.output_dir": "123", "model.vision.patch_size": [8, 8], "model.vision": {"a": 1}}


def test_default_of_reads_the_configuration() -> None:
    assert default_of("train.learning_rate") == 1e-5
