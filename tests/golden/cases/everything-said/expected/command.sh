#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z. Starts the ranks of one node.
# Run it on each of the 2 nodes, HEAD_NODE replaced by the first.
set -euo pipefail
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=8
export PYTORCH_ALLOC_CONF=expandable_segments:True
export TOKENIZERS_PARALLELISM=false
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
exec torchrun \
  --nnodes=2 \
  --rdzv-backend=c10d \
  --rdzv-endpoint=HEAD_NODE:29500 \
  --rdzv-id=everything-said \
  --nproc-per-node=8 \
  --shutdown-timeout=120 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m launcher.train \
  /runs/everything-said
