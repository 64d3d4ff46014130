#!/usr/bin/env bash
# The smoke run: 4 GPUs, batch 1, SA-1B capped at 500 images, with whatever data sets are given by these variables:
#
#   PRETRAINED_PTH  Sa2VA weights             MODEL_PATH      folder of the base model (its tokenizer)
#   SAV_DIR         SA-V frame pairs          SA1B_DIR        SA-1B
#   OPENIMAGE_DIR   Open Images               REFCOCO_DIR     RefCOCO, RefCOCO+, RefCOCOg
#   OUTPUT_DIR      run folder (outputs/test_dual_loop)       NPROC   processes (4; embedded: the GPUs there are, or 1)
#
# Without any data path it runs the embedded default: generated data, the tiny model and its checkpoint, no download,
# no GPU needed, evaluation on held-out scenes before and after. Further arguments go to the trainer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Everything that the commands of the README need; set it to nothing for training alone.
export DUAL_LOOP_EXTRAS="${DUAL_LOOP_EXTRAS-caption-eval,parquet}"

OUTPUT_DIR=${OUTPUT_DIR:-outputs/test_dual_loop}
MARK=$OUTPUT_DIR/.embedded_run

# Set ARGUMENTS and NPROC for the data sets that the variables name.
real_run() {
  local missing=() name
  for name in PRETRAINED_PTH MODEL_PATH SAV_DIR SA1B_DIR OPENIMAGE_DIR REFCOCO_DIR; do
    if [ -n "${!name:-}" ] && [ ! -e "${!name}" ]; then missing+=("$name: no such path: ${!name}"); fi
  done
  for name in PRETRAINED_PTH MODEL_PATH; do
    if [ -z "${!name:-}" ]; then missing+=("$name is not set"); fi
  done
  if [ ${#missing[@]} -gt 0 ]; then
    printf 'error: the real data needs the real model:\n' >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 2
  fi
  NPROC=${NPROC:-4}
  ARGUMENTS=(--config configs/sa2va_4b_smoke.py --pretrained_pth "$PRETRAINED_PTH" --model_path "$MODEL_PATH"
    --sa1b_max_samples 500 --batch_size 1)
  if [ -n "${SAV_DIR:-}" ]; then ARGUMENTS+=(--sav_dir "$SAV_DIR"); fi
  if [ -n "${SA1B_DIR:-}" ]; then ARGUMENTS+=(--sa1b_dir "$SA1B_DIR"); fi
  if [ -n "${OPENIMAGE_DIR:-}" ]; then ARGUMENTS+=(--openimage_dir "$OPENIMAGE_DIR"); fi
  if [ -n "${REFCOCO_DIR:-}" ]; then ARGUMENTS+=(--refcoco_dir "$REFCOCO_DIR"); fi
}

# Write the generated data (once) and set ARGUMENTS and NPROC for it.
embedded_run() {
  local demo=outputs/demo_data gpus=0
  # demo.json is written last: without it an earlier attempt was cut off.
  if [ ! -f "$demo/demo.json" ]; then
    rm -rf "$demo"
    "$PYTHON" -m dual_loop.cli demo-data "$demo" --images "${DEMO_IMAGES:-600}" \
      --captioned "${DEMO_CAPTIONED:-100}" --val "${DEMO_VAL:-120}" --seed 0
  fi
  if [ -f "$MARK" ]; then
    echo "Removing the earlier embedded run in $OUTPUT_DIR"
    rm -rf "$OUTPUT_DIR"
  fi
  # A folder that somebody else filled gets no mark, so that it is never removed; the trainer refuses it.
  if [ -z "$(ls -A "$OUTPUT_DIR" 2>/dev/null)" ]; then
    mkdir -p "$OUTPUT_DIR"
    touch "$MARK"
  fi
  if command -v nvidia-smi >/dev/null 2>&1; then gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
  NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
  ARGUMENTS=(--config configs/tiny_demo.py --sav_dir "$demo/sav" --sa1b_dir "$demo/sa1b"
    --openimage_dir "$demo/openimages" --refcoco_dir "$demo/ref_seg" --eval_dir "$demo/ref_seg")
}

if [ -n "${SAV_DIR:-}${SA1B_DIR:-}${OPENIMAGE_DIR:-}${REFCOCO_DIR:-}" ]; then
  real_run
  source scripts/setup_env.sh
else
  echo "No data path is set (SAV_DIR, SA1B_DIR, OPENIMAGE_DIR, REFCOCO_DIR): running the embedded default on generated data"
  source scripts/setup_env.sh
  embedded_run
fi

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" -m dual_loop.train_dual_loop \
  "${ARGUMENTS[@]}" --output_dir "$OUTPUT_DIR" "$@"
