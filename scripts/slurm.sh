#!/usr/bin/env bash
#SBATCH --job-name=dual_loop
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# The full run under SLURM, one launcher a machine, any number of machines:
#
#   export PRETRAINED_PTH=... MODEL_PATH=... SAV_DIR=... SA1B_DIR=... OPENIMAGE_DIR=... REFCOCO_DIR=... OUTPUT_DIR=...
#   sbatch --nodes 2 scripts/slurm.sh
#
# Submit from the repository, and keep it, the environment and OUTPUT_DIR on a file system that all machines share: make
# the environment once on the login machine (bash scripts/setup_env.sh). Two minutes before the time limit SLURM sends
# SIGTERM; the trainer then saves after its current step, and the job's next start goes on from there.
# Keep 64 images a step on more machines: with --nodes 2 add --gradient_accumulation_steps 2.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

NNODES=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
export NNODES MASTER_ADDR MASTER_PORT NPROC

# NODE_RANK differs by task, so it is read inside each one.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash run_dual_loop_full.sh "$@"' run_dual_loop "$@"
