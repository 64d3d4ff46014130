#!/usr/bin/env bash
# What takes longer than .ci/run may: ten minutes of faults, five minutes of load on the page, the documents in
# full (what the example on one's own masks gains).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DUAL_LOOP_EXTRAS=dev OMP_NUM_THREADS=1
source scripts/setup_env.sh
"$PYTHON" scripts/soak.py --minutes 10 --seed "$(date +%Y%m%d)"
"$PYTHON" scripts/load_page.py --clients 8 --minutes 5
DUAL_LOOP_DOCS_IN_FULL=1 "$PYTHON" -m pytest -q tests/docs
