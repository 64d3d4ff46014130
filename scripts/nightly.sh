#!/usr/bin/env bash
# What takes longer than .ci/run may: ten minutes of faults, five minutes of load on the page, the documents in
# full (what the example on one's own masks gains), and what bitsandbytes packs, whose import would slow all tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DUAL_LOOP_EXTRAS=dev OMP_NUM_THREADS=1
source scripts/setup_env.sh
"$PYTHON" scripts/soak.py --minutes 10 --seed "$(date +%Y%m%d)"
"$PYTHON" scripts/load_page.py --clients 8 --minutes 5
"$PYTHON" -m pip install --quiet -c scripts/constraints.txt -e ".[quantize]"
"$PYTHON" -m pytest -q tests/model/test_quantize.py tests/training/test_optim.py
DUAL_LOOP_DOCS_IN_FULL=1 "$PYTHON" -m pytest -q tests/docs
