#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z. Starts the ranks of one node.
set -euo pipefail
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=8
export PYTORCH_ALLOC_CONF=expandable_segments:True
export TOKENIZERS_PARALLELISM=false
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
exec torchrun \
  --standalone \
  --nproc-per-node=8 \
  --shutdown-timeout=2898 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m launcher.train \
  /runs/8b-full-fsdp
