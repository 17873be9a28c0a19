#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z. Starts the ranks of one node.
# On CPU sftlaunch starts the same ranks by fork: one import for all of them.
set -euo pipefail
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY=PASSIVE
export TOKENIZERS_PARALLELISM=false
exec torchrun \
  --standalone \
  --nproc-per-node=2 \
  --shutdown-timeout=120 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m launcher.train \
  /runs/cpu-two-ranks-fsdp
