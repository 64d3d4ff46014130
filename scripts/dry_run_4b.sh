#!/usr/bin/env bash
# One whole optimiser step of the real 4B configuration on a CPU: random bf16 weights, no downloads, no GPU.
#
#   bash scripts/dry_run_4b.sh                  about 3 minutes and 14 GiB on two cores; 4 GiB of disk while it runs
#   bash scripts/dry_run_4b.sh --folder OUT     keep the run folder and its checkpoint
#
# Prints seconds by phase, the peak resident memory and which parameters moved. Exit status 1: over 20 GiB
# (--limit_gib), or a trained tensor that a gradient should have reached did not move.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec "$PYTHON" scripts/real_size_step.py "$@"
