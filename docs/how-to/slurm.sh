#!/bin/bash
# A training on Slurm: sbatch slurm.sh. It is queued again when its time is up or it was preempted, and goes on then.
#SBATCH --job-name=ademamix
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To this script, two minutes before the end.
#SBATCH --signal=B:TERM@120

out=runs/330m # on a file system that all nodes share
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 100 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m ademamix train --preset 330m --data my_tokens --shard --out "$out" --go-on &
training=$!

stopped=no
trap 'stopped=yes; kill -TERM "$training"' TERM
wait "$training"
status=$?
if [ "$stopped" = yes ]; then
    wait "$training" # the signal had ended the first one
    [ -e "$out/result.json" ] || scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
