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
#
# Machines that come and go: NNODES=1:4 takes what there is, from 1 to 4, and NODE_RANK is not needed. MASTER_ADDR is the
# machine that has to stay. EFFECTIVE_BATCH (64) images a step are shared out anew each time, BATCH_SIZE (2) at once on a
# process; every number of machines must fit. MAX_RESTARTS (100), RUN_ID (dual_loop). All of them alike on all machines.
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

# The trainer's share of a run whose machines come and go.
elastic=()
if [[ $NNODES == *:* ]]; then
  EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-64}
  BATCH_SIZE=${BATCH_SIZE:-2}
  for ((machines = ${NNODES%%:*}; machines <= ${NNODES##*:}; machines++)); do
    at_once=$((machines * NPROC * BATCH_SIZE))
    if [ $((EFFECTIVE_BATCH % at_once)) -ne 0 ]; then
      echo "error: EFFECTIVE_BATCH=$EFFECTIVE_BATCH images cannot be shared out evenly on $machines machines" \
        "($machines x NPROC=$NPROC x BATCH_SIZE=$BATCH_SIZE = $at_once at once), nothing was started;" \
        "to do: choose an EFFECTIVE_BATCH that fits every number of machines of NNODES=$NNODES" >&2
      exit 2
    fi
  done
  elastic=(--batch_size "$BATCH_SIZE" --effective_batch "$EFFECTIVE_BATCH")
fi

if [ "${DRY_RUN:-0}" = 1 ]; then
  if [ ${#missing[@]} -gt 0 ]; then
    echo "Note: a real run would stop here, because of:"
    printf '  %s\n' "${missing[@]}"
  fi
  source scripts/setup_env.sh
  WORLD_SIZE=$((NPROC * ${NNODES##*:})) exec "$PYTHON" -m dual_loop.train_dual_loop \
    --config configs/sa2va_4b_full.py --dry_run ${elastic[@]+"${elastic[@]}"} "$@"
fi

if [ ${#missing[@]} -gt 0 ]; then
  {
    echo "error: ${#missing[@]} path(s) missing, nothing was started:"
    printf '  %s\n' "${missing[@]}"
  } >&2
  exit 2
fi

source scripts/setup_env.sh
if [[ $NNODES == *:* ]]; then
  rendezvous=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_id "${RUN_ID:-dual_loop}"
    --rdzv_endpoint "${MASTER_ADDR:?set MASTER_ADDR to the machine that stays}:${MASTER_PORT:-29500}"
    --max_restarts "${MAX_RESTARTS:-100}")
  # Shared stores (torch's default) are announced in the first round only: a machine that joins later waits for ever, seen
  # with torch 2.13, and one whose rank changes fails before that (pytorch/pytorch issue 182221).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
elif [ "$NNODES" -gt 1 ]; then
  rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set NODE_RANK on each machine, from 0}"
    --master_addr "${MASTER_ADDR:?set MASTER_ADDR to the first machine}" --master_port "${MASTER_PORT:-29500}")
else
  rendezvous=(--standalone)
fi

exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$NPROC" -m dual_loop.train_dual_loop \
  --config configs/sa2va_4b_full.py --pretrained_pth "$PRETRAINED_PTH" --model_path "$MODEL_PATH" \
  --sav_dir "$SAV_DIR" --sa1b_dir "$SA1B_DIR" --openimage_dir "$OPENIMAGE_DIR" --refcoco_dir "$REFCOCO_DIR" \
  --output_dir "$OUTPUT_DIR" --resume auto ${elastic[@]+"${elastic[@]}"} "$@"
