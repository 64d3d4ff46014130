#!/usr/bin/env bash
# The full run: 8 GPUs x batch 2 x accumulation 4 = 64, all four data sets. Every path comes from the environment:
#
#   PRETRAINED_PTH  Sa2VA weights             MODEL_PATH      folder of the base model (its tokenizer)
#   SAV_DIR         SA-V frame pairs          SA1B_DIR        SA-1B
#   OPENIMAGE_DIR   Open Images               REFCOCO_DIR     RefCOCO, RefCOCO+, RefCOCOg
#   OUTPUT_DIR      run folder (outputs/dual_loop_full)       NPROC   processes on this machine (8)
#   DRY_RUN=1       print what trains, the memory estimate and the effective batch, and stop
#
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each (scripts/slurm.sh does). An interrupted
# run goes on from its newest checkpoint. Further arguments go to the trainer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

REQUIRED=(PRETRAINED_PTH MODEL_PATH SAV_DIR SA1B_DIR OPENIMAGE_DIR REFCOCO_DIR)
NPROC=${NPROC:-8}
NNODES=${NNODES:-1}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/dual_loop_full}

missing=()
for name in "${REQUIRED[@]}"; do
  if [ -z "${!name:-}" ]; then
    missing+=("$name is not set")
  elif [ ! -e "${!name}" ]; then
    missing+=("$name: no such path: ${!name}")
  fi
done

if [ "${DRY_RUN:-0}" = 1 ]; then
  if [ ${#missing[@]} -gt 0 ]; then
    echo "Note: a real run would stop here, because of:"
    printf '  %s\n' "${missing[@]}"
  fi
  source scripts/setup_env.sh
  WORLD_SIZE=$((NPROC * NNODES)) exec "$PYTHON" -m dual_loop.train_dual_loop --config configs/sa2va_4b_full.py --dry_run "$@"
fi

if [ ${#missing[@]} -gt 0 ]; then
  {
    echo "error: ${#missing[@]} path(s) missing, nothing was started:"
    printf '  %s\n' "${missing[@]}"
  } >&2
  exit 2
fi

source scripts/setup_env.sh
if [ "$NNODES" -gt 1 ]; then
  rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK on each machine, from 0}"
    --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}" --master_port "${MASTER_PORT:-29500}")
else
  rendezvous=(--standalone)
fi

exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$NPROC" -m dual_loop.train_dual_loop \
  --config configs/sa2va_4b_full.py --pretrained_pth "$PRETRAINED_PTH" --model_path "$MODEL_PATH" \
  --sav_dir "$SAV_DIR" --sa1b_dir "$SA1B_DIR" --openimage_dir "$OPENIMAGE_DIR" --refcoco_dir "$REFCOCO_DIR" \
  --output_dir "$OUTPUT_DIR" --resume auto "$@"
