#!/usr/bin/env bash
#SBATCH --job-name=dual_loop
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# The full run under SLURM, one launcher a machine, any number of machines:
#
#   export PRETRAINED_PTH=... MODEL_PATH=... SAV_DIR=... SA1B_DIR=... OPENIMAGE_DIR=... REFCOCO_DIR=... OUTPUT_DIR=...
#   sbatch --nodes 2 scripts/slurm.sh
#
# Submit from the repository, and keep it, the environment and OUTPUT_DIR on a file system that all machines share: make
# the environment once on the login machine (bash scripts/setup_env.sh).
#
# Five minutes before the time limit SLURM sends SIGUSR1 to this script, which passes it on. The trainers save after
# their current step and leave, and the job is put back into the queue; its next start goes on from there. A job that is
# preempted, or that loses a machine, is put back by SLURM itself (--requeue).
# EFFECTIVE_BATCH (64) images a step, on any number of machines.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

NNODES=$SLURM_JOB_NUM_NODES
# Read whole, then cut: with a pipe into head, scontrol may meet a closed pipe and end the job (pipefail).
HOSTS_OF_JOB=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${HOSTS_OF_JOB%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
export NNODES MASTER_ADDR MASTER_PORT NPROC

interrupted=1 time_is_up=0 status=0
pass_on() {
  interrupted=1 time_is_up=1
  echo "Time is nearly up: the trainers are told to save and leave"
  kill -USR1 "$task" 2>/dev/null || true # srun passes it on to its tasks
}

srun --kill-on-bad-exit=1 bash scripts/slurm_machine.sh --effective_batch "${EFFECTIVE_BATCH:-64}" "$@" &
task=$!
trap pass_on USR1
# A trapped signal ends `wait` before its time.
while [ "$interrupted" = 1 ]; do
  interrupted=0 status=0
  wait "$task" || status=$?
done

if [ "$time_is_up" = 1 ] && [ "$status" = 0 ]; then
  echo "Back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
