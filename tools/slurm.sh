#!/usr/bin/env bash
# Train on the machines of a Slurm job by torchrun. The arguments go to train_net.py:
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 tools/slurm.sh \
#       --config-file configs/mask_rcnn_R50_gnws_2x.yaml OUTPUT_DIR output/shared
#
# A worker or machine that fails is restarted up to three times. Three minutes before the time limit
# training writes a checkpoint, and the job is requeued; Slurm itself requeues a job that is
# preempted. Each start resumes from the last checkpoint in OUTPUT_DIR, which all machines share.
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
port=$((10000 + SLURM_JOB_ID % 20000)) # one for each job, as two may share a machine

# Give each start its own store, and workers the time to write a checkpoint.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
# Without it, srun would kill the other machines before their checkpoint is written.
srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$port" train_net.py --resume "$@" &
srun=$!

time_limit= again=1
trap 'time_limit=1 again=1; kill -TERM "$srun" || true' USR1
trap 'again=1; kill -TERM "$srun" || true' TERM # of scancel and preemption
while [ -n "$again" ]; do # a signal ends `wait`, too
    again= status=0
    wait "$srun" || status=$?
done
if [ -n "$time_limit" ] && [ "$status" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
