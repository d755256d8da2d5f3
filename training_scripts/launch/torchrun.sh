#!/bin/bash
# Train with torchrun. When a process dies all are started again, and go on from the newest checkpoint:
#
#   training_scripts/launch/torchrun.sh vitl16_im1k --train_data photos/ --output_dir runs/vitl16
#
# That is one machine and all of its GPUs. The same on each of several, with RENDEZVOUS=HOST:PORT of one of them:
#
#   NNODES=2   RENDEZVOUS=node0:29500 training_scripts/launch/torchrun.sh ...
#   NNODES=1:4 RENDEZVOUS=node0:29500 training_scripts/launch/torchrun.sh ...     one to four, which may come and go
#
# PROCESSES (of each machine), RESTARTS and SCRIPT change what their names say. SIGTERM or SIGUSR1 to this script saves
# the run and ends it with status 75; the same command goes on. output_dir must be on a disk that all machines share.

set -euo pipefail

SCRIPT="${SCRIPT:-training_scripts/pretrain.py}"
if [[ -n "${RENDEZVOUS:-}" ]]; then
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-dinov3}")
else
    meeting=(--standalone)
fi
# Seconds that a save may take when torchrun is told to end; without it 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# A store of its own for every start: in a shared one processes find the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun --nnodes "${NNODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" --max-restarts "${RESTARTS:-10}" \
    "${meeting[@]}" "$SCRIPT" "$@" --resume_from_checkpoint auto &
torchrun=$!

was_told=false
trap 'was_told=true; kill -TERM "$torchrun"' TERM USR1

status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends `wait` before the process
    status=0
    wait "$torchrun" || status=$?
done
# torchrun has a status of its own when it is told to end.
if $was_told && [[ "$status" -ne 0 ]]; then
    exit 75
fi
exit "$status"
