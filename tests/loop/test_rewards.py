"""Rewards: lengths, references, errors."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.caption_metrics import meteor_exact_stem
from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError
from dual_loop.loop.rewards import RewardSet, combined_caption_reward, length_rewards


def test_lengths():
    assert length_rewards(["", "a", "a b", "a b c", "a b c d e", "a b c d e f"], 2, 3) == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 1 / 3, 0.0]
    )


@given(st.integers(0, 100))
def test_lengths_stay_in_range(count):
    (reward,) = length_rewards([" ".join("w" * count)], 3, 20)
    assert 0.0 <= reward <= 1.0
    assert (reward == 1.0) == (3 <= count <= 20)


def test_combined_caption_reward_without_a_judge_is_the_variant():
    found = combined_caption_reward(["red circle", "x", "blue star"], [["the red circle"], [], ["blue star"]])
    assert found[0] == meteor_exact_stem("red circle", ["the red circle"])
    assert math.isnan(found[1])
    assert found[2] == 1.0
    with pytest.raises(ValueError, match="differ in number"):
        combined_caption_reward(["a"], [])


class FixedJudge:
    """Marks 0.5, or nothing for captions that say so."""

    def __init__(self):
        self.asked = []

    def ask(self, questions):
        self.asked += [question.generated for question in questions]
        return [None if question.generated == "mute" else 0.5 for question in questions]


def test_combined_caption_reward_with_a_judge():
    judge = FixedJudge()
    found = combined_caption_reward(["blue star", "mute", "none"], [["blue star"], ["mute"], []], judge)
    assert found[:2] == pytest.approx([0.25 + 0.75 * 0.5, 1.0])
    assert judge.asked == ["blue star", "mute"]


def score(config, judge=None, gates=(None, None), references=(["red circle"], [])):
    matrix = torch.tensor([[0.7, 0.2], [0.1, 0.6]])
    names = ["s/1#0", "s/1#1"]
    texts = ["red circle", "blue star"]
    return RewardSet(config, judge).score(texts, torch.tensor([0, 1]), matrix, list(references), list(gates), names)


def test_reward_set():
    config = RewardConfig(cycle_weight=1.0, contrast_weight=0.5, caption_weight=0.1, length_weight=0.1)
    found = score(config)
    assert set(found) == {"cycle", "contrast", "caption", "length"}
    assert found["cycle"].tolist() == pytest.approx([0.7, 0.6])
    assert found["contrast"].tolist() == pytest.approx([0.5, 0.5])
    assert float(found["caption"][0]) == 1.0
    assert math.isnan(float(found["caption"][1]))


def test_gated_captions_earn_nothing_and_are_not_judged():
    judge = FixedJudge()
    found = score(RewardConfig(cycle_weight=1.0, caption_weight=1.0), judge, gates=("coordinates", None))
    assert found["cycle"].tolist() == pytest.approx([0.0, 0.6])
    assert float(found["caption"][0]) == 0.0
    assert judge.asked == []


def test_a_gated_caption_earns_the_least_of_every_reward():
    weights = {f"{name}_weight": 1.0 for name in ("cycle", "contrast", "caption", "length")}
    found = score(RewardConfig(**weights), gates=("coordinates", "coordinates"))
    # No honest caption can earn less: 0 is the middle of the contrast reward.
    assert {name: float(value[0]) for name, value in found.items()} == {
        "cycle": 0.0,
        "contrast": -1.0,
        "caption": 0.0,
        "length": 0.0,
    }


@pytest.mark.parametrize("name", ["contrast", "caption", "length"])
def test_the_cycle_reward_comes_alone_or_where_it_is_asked_for(name):
    assert RewardSet(RewardConfig()).weights == {"cycle": 1.0}
    assert RewardSet(RewardConfig(**{f"{name}_weight": 0.1})).weights == {name: 0.1}
    assert RewardSet(RewardConfig(cycle_weight=0.5, **{f"{name}_weight": 0.1})).weights == {"cycle": 0.5, name: 0.1}


def test_all_sentences_of_a_region_are_references():
    found = score(RewardConfig(caption_weight=1.0), references=(["the dog", "red circle", "a cat"], []))
    assert float(found["caption"][0]) == 1.0


def test_a_caption_without_any_reward_is_named_once_and_earns_nothing(caplog):
    rewards = RewardSet(RewardConfig(caption_weight=1.0))
    given = (["a b"], torch.tensor([0]), torch.tensor([[0.5]]), [[]], [None], ["s/1#0"])
    with caplog.at_level(logging.WARNING, logger="dual_loop"):
        for _ in range(2):
            assert math.isnan(float(rewards.score(*given)["caption"]))
    assert caplog.text.count("s/1#0") == 1
    assert "--cycle_reward_weight" in caplog.text


def test_wrong_weights():
    with pytest.raises(ConfigError, match="negative"):
        RewardSet(RewardConfig(length_weight=-1.0))
    with pytest.raises(ConfigError, match="no reward is on"):
        RewardSet(RewardConfig(cycle_weight=0.0))
