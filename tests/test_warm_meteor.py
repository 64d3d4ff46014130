"""The ``java`` that asks a METEOR that runs: one for all, whose answers are its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import warm_meteor

# Answers as METEOR does: a line for a line, and N + 1 to EVAL and N statistics; each ends in the number of its process.
JAVA = """#!/bin/sh
case "$*" in *meteor-1.5.jar*) ;; *) echo "other $*"; exit 3 ;; esac
while read -r line; do
  case "$line" in
    EVAL*) for part in $(echo "$line" | sed 's/|||/\\n/g'); do echo "$part $$"; done ;;
    *) echo "$line $$" ;;
  esac
done
"""


def test_all_share_one_program_and_other_programs_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "java").write_text(JAVA)
    (tmp_path / "java").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    variables = {"env": {**os.environ, "PATH": warm_meteor.warm_meteor.__wrapped__()}, "text": True}
    command = ["java", "-jar", "meteor-1.5.jar", "-", "-"]
    answers = []
    for first in ("a", "b"):
        lines = f"SCORE {first}\nEVAL ||| 1 ||| 2\nSCORE c\n"
        done = subprocess.run(command, input=lines, capture_output=True, timeout=60, check=True, **variables)
        answers.append([line.rsplit(" ", 1) for line in done.stdout.splitlines()])
    texts = [[text for text, _ in answer] for answer in answers]
    assert texts == [[f"SCORE {first}", "EVAL", "1", "2", "SCORE c"] for first in ("a", "b")]
    assert len({number for answer in answers for _, number in answer}) == 1
    other = subprocess.run(["java", "-version"], capture_output=True, check=False, **variables)
    assert (other.stdout, other.returncode) == ("other -version\n", 3)
