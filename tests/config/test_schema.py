"""Every config file loads through the typed layer, which refuses what mmengine would keep without a word."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dual_loop.config import CONFIG_DIR, SETTINGS, Config, TrainConfig, load_config, overrides_from, resolve_config_path
from dual_loop.errors import ConfigError
from dual_loop.model.adapters import GROUPS
from dual_loop.model.prompts import ANY, CAPTION_QUESTIONS, SEGMENT_ANSWERS, SEGMENT_QUESTIONS, TEMPLATES

CONFIG_FILES = sorted(CONFIG_DIR.glob("*.py"))


def dotted_keys() -> list[str]:
    """Return every setting as ``group.name``."""
    groups = typing.get_type_hints(Config)
    return [f"{group}.{field.name}" for group, cls in groups.items() for field in dataclasses.fields(cls)]


def test_there_are_configs() -> None:
    assert {"tiny_cpu", "sa2va_4b_smoke", "sa2va_4b_full"} <= {path.stem for path in CONFIG_FILES}


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    text = json.dumps(config.to_dict())
    written = tmp_path / "config.json"
    written.write_text(text, encoding="utf-8")
    assert load_config(written) == config


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_says_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')


def test_the_full_run_has_the_stated_effective_batch() -> None:
    train = load_config(CONFIG_DIR / "sa2va_4b_full.py").train
    assert 8 * train.batch_size * train.gradient_accumulation_steps == 64


def test_the_smoke_run_has_batch_one() -> None:
    assert load_config(CONFIG_DIR / "sa2va_4b_smoke.py").train.batch_size == 1


@given(st.sampled_from(dotted_keys()), st.data())
def test_a_misspelt_key_is_refused_with_the_nearest_name(dotted: str, data: st.DataObject) -> None:
    group, name = dotted.split(".")
    position = data.draw(st.integers(0, len(name) - 1))
    misspelt = f"{name[:position]}{name[position]}{name[position:]}"  # one letter typed twice
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={f"{group}.{misspelt}": 1})
    assert f"unknown key '{group}.{misspelt}'" in str(caught.value)
    assert f"did you mean {group}.{name}?" in str(caught.value)


def test_a_misspelt_key_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("train = dict(learning_rat=1e-4)\nmodell = dict()\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"did you mean train\.learning_rate\?") as caught:
        load_config(path)
    assert "did you mean model?" in str(caught.value)
    assert "2 problem(s)" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"train.seed": "many", "data.nope": 1, "model": 3},
            ["train.seed: seen 'many', expected int", "unknown key 'data.nope'", "model: seen 3, expected a group"],
        ),
        (
            {"train.batch_size": 0, "model.dtype": "bfloat61", "train.ema_decay": 2},
            ["train.batch_size: seen 0, expected at least 1", "did you mean bfloat16?", "train.ema_decay: seen 2"],
        ),
        (
            {"model.template": "phi3chat", "loop.segment_question": "canyou", "train.betas": [0.9, 1]},
            ["did you mean phi3_chat?", "did you mean can_you?", "train.betas: seen (0.9, 1.0)"],
        ),
    ],
)
def test_every_problem_is_reported_at_once(overrides: dict[str, object], expected: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"3 problem\(s\)") as caught:
        load_config(overrides=overrides)
    assert [part for part in expected if part not in str(caught.value)] == []


def test_the_words_of_prompts_are_those_of_the_settings() -> None:
    banks = {"caption_question": CAPTION_QUESTIONS, "segment_question": SEGMENT_QUESTIONS}
    for name, bank in {**banks, "segment_answer": SEGMENT_ANSWERS}.items():
        assert SETTINGS[f"loop.{name}"].choices == (*bank, ANY)
    assert SETTINGS["model.template"].choices == tuple(TEMPLATES)
    assert SETTINGS["model.trainable"].choices == tuple(GROUPS)


@pytest.mark.parametrize("dotted", sorted(key for key, about in SETTINGS.items() if about.choices))
def test_every_choice_is_taken_and_others_refused(dotted: str) -> None:
    group, name = dotted.split(".")
    for value in SETTINGS[dotted].choices:
        measured = {"data.eval_dir": "held_out", "train.eval_interval": 5}  # some words need something to measure
        read = load_config(overrides={**measured, dotted: value}).to_dict()[group][name]
        assert read == ([value] if dotted in ("reward.gates", "model.trainable", "train.report_to") else value)
    with pytest.raises(ConfigError, match=dotted):
        load_config(overrides={dotted: "none of these"})


@pytest.mark.parametrize("dotted", sorted(key for key, about in SETTINGS.items() if about.at_least is not None))
def test_a_value_under_its_minimum_is_refused(dotted: str) -> None:
    with pytest.raises(ConfigError, match=dotted):
        load_config(overrides={dotted: int(SETTINGS[dotted].at_least) - 1})


@pytest.mark.parametrize("dotted", sorted(key for key, about in SETTINGS.items() if about.at_most is not None))
def test_a_value_over_its_maximum_or_not_a_number_is_refused(dotted: str) -> None:
    for value in (SETTINGS[dotted].at_most + 0.1, float("nan")):
        with pytest.raises(ConfigError, match=dotted):
            load_config(overrides={dotted: value})


@pytest.mark.parametrize("dotted", ["speed.checkpoint_layers", "speed.images_at_once"])
def test_a_word_or_a_number(dotted: str) -> None:
    group, name = dotted.split(".")
    assert getattr(getattr(load_config(overrides={dotted: 3}), group), name) == "3"
    with pytest.raises(ConfigError, match="or a number from"):
        load_config(overrides={dotted: "some"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"loop.cycle_keep": 0.4}, "expected keep above drop"),
        ({"reward.length_weight": 1, "policy.caption_gradient": "gumbel"}, "nobody learns from it with gumbel"),
        ({"data.sav_min_seconds": 3.0}, "expected the second no smaller"),
        ({"policy.caption_gradient": "grpo", "policy.captions_per_region": 1}, "a group of one has no rest"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(overrides=overrides)


def test_every_setting_says_what_it_does_and_no_flag_is_given_twice() -> None:
    assert [key for key in dotted_keys() if len(SETTINGS[key].doc) < 6] == []
    flags = [about.flag for about in SETTINGS.values() if about.flag]
    assert len(flags) == len(set(flags)) > 60


def test_the_defaults_satisfy_their_own_limits() -> None:
    assert load_config() == Config()


@given(
    st.builds(
        TrainConfig,
        seed=st.integers(0, 2**31),
        learning_rate=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        max_steps=st.none() | st.integers(1, 10**6),
        output_dir=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1).filter(
            lambda text: text.lower() != "none"
        ),
    )
)
def test_any_training_settings_survive_a_dict(train: TrainConfig) -> None:
    tree = json.loads(json.dumps(Config(train=train).to_dict()))
    overrides = {f"{group}.{name}": value for group, values in tree.items() for name, value in values.items()}
    assert load_config(overrides=overrides) == Config(train=train)


NOT_FINITE = [float("nan"), float("inf"), -float("inf"), "nan", "inf", 10**400, 1e300]
WRONG_KIND: list[object] = [{"a": 1}, [[1]], "\0", "\ud800", b"1", 1j, object()]


def wrong_values(dotted: str) -> list[object]:
    """Return values of each kind that the setting does not take."""
    group, name = dotted.split(".")
    hint = typing.get_type_hints(typing.get_type_hints(Config)[group])[name]
    words = str(hint) if typing.get_origin(hint) else hint.__name__
    about, wrong = (
        SETTINGS[dotted],
        [value for value in WRONG_KIND if "Mapping" not in words or not isinstance(value, dict)],
    )
    if "None" not in words:
        wrong += [None]
    if "Mapping" in words:
        return [*wrong, 3, "x", {"hidden_size": float("nan")}, {"a": {"b": float("inf")}}]
    if words == "bool":
        return [*wrong, 3, 1.5, "maybe", float("nan")]
    if "str" not in words:
        assert about.at_least is not None
        assert about.at_most is not None
        return [*wrong, *NOT_FINITE, True, "many", about.at_least - 1, about.at_most * 2 + 1]
    return [*wrong, 1.5, float("nan"), *(["none of these", "²", "9" * 5000, "-1"] if about.choices else [])]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(dotted_keys()), st.integers(0, 99), min_size=1, max_size=6))
def test_wrong_settings_are_all_named_in_one_message(drawn: dict[str, int]) -> None:
    wrong = {key: values[number % len(values)] for key, number in drawn.items() for values in [wrong_values(key)]}
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=wrong)
    assert [key for key in wrong if key not in str(caught.value)] == []


@pytest.mark.parametrize("dotted", dotted_keys())
def test_every_wrong_value_of_every_setting_is_refused(dotted: str) -> None:
    for value in wrong_values(dotted):
        with pytest.raises(ConfigError, match=dotted):
            load_config(overrides={dotted: value})


@pytest.mark.parametrize("text", ["{[1]: 2}", "(" * 5000, "[1, 2", "{'a': 1}"])
def test_options_that_hold_no_value_of_the_setting_are_refused(text: str) -> None:
    options = overrides_from(argparse.Namespace(cfg_options=[f"train.seed={text}"]))
    with pytest.raises(ConfigError, match=r"train\.seed"):
        load_config(overrides=options)


def test_text_from_the_command_line_is_converted() -> None:
    texts = {"train.seed": "7", "train.learning_rate": "1e-4", "train.max_steps": "none", "train.betas": "0.8, 0.9",
             "model.single_mask": "true", "data.refcoco_datasets": "refcoco,refcocog"}  # fmt: skip
    config = load_config(overrides=texts)
    assert (config.train.seed, config.train.learning_rate, config.train.max_steps) == (7, 1e-4, None)
    assert config.train.betas == (0.8, 0.9)
    assert config.model.single_mask is True
    assert config.data.refcoco_datasets == ("refcoco", "refcocog")


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("train.seed", 1.5),
        ("train.seed", True),
        ("train.betas", (0.9,)),
        ("model.single_mask", "maybe"),
        ("train", 3),
        ("model.vision", "x"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(dotted: str, value: object) -> None:
    with pytest.raises(ConfigError, match=dotted):
        load_config(overrides={dotted: value})


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="below a value"):
        load_config(CONFIG_DIR / "tiny_cpu.py", overrides={"model.name.first": 1})


def test_a_file_that_does_not_parse_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("train = dict(\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.py"):
        load_config(path)


def test_a_config_is_found_by_name_and_a_near_miss_is_named() -> None:
    assert resolve_config_path("tiny_cpu") == CONFIG_DIR / "tiny_cpu.py"
    assert resolve_config_path("configs/tiny_cpu.py").samefile(CONFIG_DIR / "tiny_cpu.py")
    with pytest.raises(ConfigError, match=r"did you mean tiny_cpu\?"):
        resolve_config_path("tiny_gpu")
