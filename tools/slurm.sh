#!/usr/bin/env bash
# Train on the machines of a Slurm job. The arguments go to train_net.py:
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 tools/slurm.sh \
#       --config-file configs/mask_rcnn_R50_gnws_2x.yaml OUTPUT_DIR output/shared
#
# Three minutes before the time limit training writes a checkpoint, and the job goes back into the
# queue. A job that is preempted, or whose machine fails, goes there by Slurm itself. However it is
# started, it goes on from the last checkpoint in OUTPUT_DIR, which all machines are to share.
#SBATCH --job-name=gnws_d2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail

# Slurm runs a copy of this file, in the directory of sbatch.
if [ ! -f train_net.py ]; then
    echo "slurm.sh: error: there is no train_net.py in $PWD: run sbatch where it is." >&2
    exit 2
fi
python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${hosts%%$'\n'*}
port=$((10000 + SLURM_JOB_ID % 20000)) # another for each job, as two may share a machine

# A machine that has written its checkpoint is not to end the others before they have theirs.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'exec "$0" train_net.py --machine-rank "$SLURM_NODEID" "$@"' "$python" \
    --num-machines "$SLURM_NNODES" --dist-url "tcp://$host:$port" \
    --num-gpus "${SLURM_GPUS_ON_NODE:-1}" --resume "$@" &
srun=$!

time_limit= again=1
trap 'time_limit=1 again=1; kill -TERM "$srun" || true' USR1
trap 'again=1; kill -TERM "$srun" || true' TERM # of scancel and preemption
while [ -n "$again" ]; do # a signal ends `wait`, too
    again= status=0
    wait "$srun" || status=$?
done
if [ -n "$time_limit" ] && [ "$status" = 143 ]; then # the exit status after such a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
