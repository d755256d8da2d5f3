#!/bin/bash
# Train on SLURM, on any number of nodes. A job that is preempted, or whose time is up, saves itself, is queued again
# and goes on:
#
#   sbatch --nodes 4 training_scripts/launch/slurm.sh vitl16_im1k --train_data photos/ --output_dir runs/vitl16
#   sbatch --nodes 32 training_scripts/launch/slurm.sh vit7b16_pretrain --engine fsdp2 --train_data photos/
#
# The arguments are those of pretrain.py; SCRIPT=training_scripts/gram_anchor.py sbatch ... runs another script.
# Submit it from the repository with the Python environment activated. Options of sbatch win over those below.
# output_dir must be on a disk that all nodes share.

#SBATCH --job-name=dinov3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# --ntasks-per-node, --gpus-per-node: one task a GPU; every task sees all GPUs of its node and takes one.
# --signal: seconds before the end; time for a step, an evaluation if one is due, and a save.

set -euo pipefail

SCRIPT="${SCRIPT:-training_scripts/pretrain.py}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch

trap : TERM # SLURM may tell this shell too: it waits for the tasks

# No torchrun: it would answer a signal by ending its processes, and hide their exit status.
# --wait: when a task has died, the others end after so many seconds. When a run has saved itself they end together.
status=0
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
    exec "$@"
' task python "$SCRIPT" "$@" --resume_from_checkpoint auto || status=$?

case "$status" in
75 | 138) # has saved itself; or was told to before it had begun (128 + SIGUSR1)
    scontrol requeue "$SLURM_JOB_ID" || echo "could not be queued again; submit the same command" >&2
    ;;
esac
exit "$status"
