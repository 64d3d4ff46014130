#!/usr/bin/env bash
# Set up the environment with the test tools, then ruff, mypy and pytest. Arguments go to pytest:
#
#   bash scripts/run_tests.sh -m "not slow"
#
#   SKIP_LINT=1       leaves ruff and mypy out
#   TEST_PROCESSES    tests run in so many processes, a file in one of them (2 unless set)
#   OMP_NUM_THREADS   threads of one process (1 unless set; more only slows models this small down)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DUAL_LOOP_EXTRAS="dev${DUAL_LOOP_EXTRAS:+,$DUAL_LOOP_EXTRAS}"
export DUAL_LOOP_EXTRAS
source scripts/setup_env.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${SKIP_LINT:-0}" != 1 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest -q --durations=10 --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile \
  --no-loadscope-reorder "$@"  # the order of tests/conftest.py
