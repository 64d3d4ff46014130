#!/usr/bin/env bash
# xtuner 0.2.0 and mmengine 0.10.6 as a boundary: our export, prompts and configs seen with their eyes. Prints one line a
# check and exits with 1 when one fails.
#
#   bash scripts/check_xtuner.sh
#
#   DUAL_LOOP_XTUNER_ENV   folder of xtuner's own environment (.venv-xtuner); a second call uses it again
#   TORCH_INDEX_URL        as in scripts/setup_env.sh
#
# xtuner pins transformers 4.48, which has neither of the model classes that this package is built on, so the two never
# share an environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh

XTUNER_ENV=${DUAL_LOOP_XTUNER_ENV:-.venv-xtuner}
STAMP=$XTUNER_ENV/.boundary_stamp
# xtuner's pins, and of its other requirements only what importing the checked parts needs.
PACKAGES=(
  transformers==4.48.0 # pinned by xtuner 0.2.0
  mmengine==0.10.6     # pinned by xtuner 0.2.0; reads our configs in the third check
  peft==0.14.0         # xtuner.model.utils imports it; the version of Sa2VA's time
  datasets             # xtuner.model imports xtuner.dataset
  einops               # xtuner.model imports its attention kernels
  safetensors          # the expected tensors come in this format
)
WANTED="xtuner==0.2.0 ${PACKAGES[*]}"

if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then
    echo "error: xtuner 0.2.0 needs Python below 3.13; set DUAL_LOOP_PYTHON to one" >&2
    exit 2
  fi
  echo "making xtuner's environment in $XTUNER_ENV (about 1.5 GB)"
  rm -rf "$XTUNER_ENV"
  "$PYTHON" -m venv "$XTUNER_ENV"
  log=$XTUNER_ENV/pip.log
  index=()
  [ -n "${TORCH_INDEX_URL:-}" ] && index=(--index-url "$TORCH_INDEX_URL")
  {
    "$XTUNER_ENV/bin/python" -m pip install "$(grep '^torch==' scripts/constraints.txt)" ${index[@]+"${index[@]}"} &&
      "$XTUNER_ENV/bin/python" -m pip install --no-deps xtuner==0.2.0 &&
      "$XTUNER_ENV/bin/python" -m pip install "${PACKAGES[@]}"
  } >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    echo "error: pip could not make xtuner's environment; all of its output is in $log" >&2
    exit 2
  }
  printf '%s\n' "$WANTED" >"$STAMP"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" scripts/xtuner_boundary/ours.py "$work"
HF_HUB_OFFLINE=1 "$XTUNER_ENV/bin/python" -W ignore scripts/xtuner_boundary/theirs.py "$work" configs
