#!/usr/bin/env bash
# One machine's part of scripts/slurm.sh, which has srun start it once a machine.
#
# SLURM gives a signal to the processes that it started itself and not to theirs (proctrack/cgroup), so they are passed
# on here: SIGTERM to the launcher, which gives its trainers 30 seconds. SIGUSR1 past the launcher, which ignores it, to
# the trainers, so that they have all the time that their step and their checkpoint need.
set -uo pipefail
command -v pkill >/dev/null || {
  echo "error: no pkill on this machine, so trainers could not be told to save; to do: install procps" >&2
  exit 2
}
export NODE_RANK=${SLURM_NODEID:?scripts/slurm.sh starts this script by srun}

interrupted=1 status=0 launcher=
trap 'interrupted=1; [ -z "$launcher" ] || pkill -USR1 -P "$launcher"' USR1
trap 'interrupted=1; [ -z "$launcher" ] || kill -TERM "$launcher"' TERM
(
  trap '' USR1
  exec bash run_dual_loop_full.sh "$@"
) &
launcher=$!
# A trapped signal ends `wait` before its time.
while [ "$interrupted" = 1 ]; do
  interrupted=0 status=0
  wait "$launcher" || status=$?
done
exit "$status"
