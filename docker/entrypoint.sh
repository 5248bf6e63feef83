#!/usr/bin/env bash
# One entrypoint for all images: `pretrain` and `finetune` start one process per GPU, everything else runs as it is.
#   NPROC_PER_NODE   processes on this node (default: its GPUs; 1 without any)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   as torchrun's flags of the same names
set -euo pipefail

# DALI and torch each start a pool; without this every rank takes all cores for itself.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Time to write a checkpoint after SIGTERM before the launcher kills; below the grace period of the launcher.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

case "${1:-}" in
    pretrain | finetune) ;;
    *) exec python3 -m cmae.train "$@" ;;
esac
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
nproc="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
nnodes="${NNODES:-1}"
if [ "$nproc" -eq 1 ] && [ "$nnodes" -eq 1 ]; then
    exec python3 -m cmae.train "$@"
fi
exec python3 -m cmae.train launch --nnodes "$nnodes" --nproc-per-node "$nproc" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
