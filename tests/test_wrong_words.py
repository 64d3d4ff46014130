"""Unknown flags, settings, commands and values are answered with the nearest right word, before torch is imported."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from dual_loop.config import add_training_flags
from dual_loop.config.schema import SETTINGS
from dual_loop.errors import OTHER_WORDS, did_you_mean

WRONG = {
    "train --mask_dir x": "did you mean --masks_dir?",
    "train --batch-size 4": "did you mean --batch_size?",
    "train --epochs 3": "did you mean --num_epochs?",
    "train --data x": "did you mean --masks_dir or --sa1b_dir or --sav_dir or --openimage_dir or --refcoco_dir?",
    "train --lr=1e-4": "did you mean --learning_rate?",
    "train --cfg-options train.lr=1": "did you mean train.learning_rate?",
    "train --cfg-options train.lora_r=4": "did you mean model.lora_r?",
    "train --config tiny_cup": "did you mean tiny_cpu?",
    "caption photo.jpg --boxs 1,2,3,4": "did you mean --box?",
    "segmnt photo.jpg": "did you mean segment?",
    "train --device 0": "did you mean cuda?",
    "train --mixed_precision bf61": "did you mean bf16?",
    "train --num_epochs three": "train.num_epochs: seen 'three', expected int",
    "train --learning_rate nan": "expected a number between 0 and 1",
    "evaluate --data refcok:val": "did you mean refcoco?",
    "audit --data openimage": "did you mean openimages?",
    "caption photo.jpg --box 10 10 50 50": "commas and no spaces",
    "caption photo.jpg --weights last": "choose from",
    "evaluate --max_samples many": "invalid int value: 'many'",
    "segment photo.jpg --out mask.png --text  ": "an empty text names nothing",
}
PROGRAM = """
import sys
from dual_loop.cli import main
for line in sys.stdin.read().splitlines():
    print("<", file=sys.stderr)
    try:
        assert main(line.split(" ")) == 2
    except SystemExit as error:
        assert error.code == 2
assert "torch" not in sys.modules
"""


def test_wrong_words_and_values_are_answered_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="\n".join(WRONG), capture_output=True, text=True, check=True, timeout=60
    )
    answers = done.stderr.split("<\n")[1:]
    assert len(answers) == len(WRONG)
    for (line, expected), answer in zip(WRONG.items(), answers, strict=True):
        assert expected in " ".join(answer.split()), (line, answer)
        assert answer.count("error:") == 1
        assert "Traceback" not in answer


def test_every_setting_is_found_by_a_word_near_it() -> None:
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    flags = list(parser._option_string_actions)
    for key, about in SETTINGS.items():
        group, name = key.split(".")
        own = [other for other in SETTINGS if other.startswith(f"{group}.")]
        assert did_you_mean(f"{group}.{name[:-1]}", [*own, *SETTINGS]).count(key) == 1
        assert f".{name}?" in did_you_mean(f"other.{name.upper()}", SETTINGS)
        if about.flag:
            assert f"--{about.flag}?" in did_you_mean(f"--{about.flag.replace('_', '-')}", flags)
    assert did_you_mean("--xyzzy", flags) == ""


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_other_words_lead_to_names_that_exist(word: str) -> None:
    names = {key.split(".")[1] for key in SETTINGS} | {about.flag for about in SETTINGS.values()} | {"cuda"}
    assert set(OTHER_WORDS[word]) <= names
    assert word not in names
