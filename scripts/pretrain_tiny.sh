#!/usr/bin/env bash
# Make the tiny checkpoint that ships in the package, from nothing: about 25 minutes on two CPU cores.
# Stages are kept in outputs/pretrain_tiny; a second call goes on where the first one stopped. Arguments go on to
# scripts/pretrain_tiny.py (see --help there).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec "$PYTHON" scripts/pretrain_tiny.py "$@"
