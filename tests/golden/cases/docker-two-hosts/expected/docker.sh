#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z. Starts the run's containers in the background, one a node.
set -euo pipefail

# Node 0. Follow: docker --host=ssh://me@gpu-a logs -f sftlaunch-docker-two-hosts-112a9a77
docker --host=ssh://me@gpu-a rm sftlaunch-docker-two-hosts-112a9a77 >/dev/null 2>&1 || true
docker \
  --host=ssh://me@gpu-a \
  run \
  --detach \
  --name=sftlaunch-docker-two-hosts-112a9a77 \
  --label=sftlaunch.run=/runs/docker-two-hosts \
  --hostname=gpu-a \
  --network=host \
  --init \
  --stop-timeout=2927 \
  --shm-size=4294967296 \
  --ulimit=memlock=-1 \
  --ulimit=stack=67108864 \
  --user=1000:1000 \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --gpus=8 \
  --mount=type=bind,source=/runs/docker-two-hosts,target=/runs/docker-two-hosts \
  --mount=type=bind,source=/models/llama,target=/models/llama,readonly \
  --mount=type=bind,source=/data/train.jsonl,target=/data/train.jsonl,readonly \
  --env=COMET_API_KEY \
  --env=HF_ENDPOINT \
  --env=HF_HUB_OFFLINE \
  --env=HF_TOKEN \
  --env=MLFLOW_TRACKING_URI \
  --env=WANDB_API_KEY \
  --env=WANDB_MODE \
  --env=WANDB_PROJECT \
  --env=HF_HOME=/runs/docker-two-hosts/cache \
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-two-hosts \
  --workdir=/runs/docker-two-hosts \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  registry.example/sftlaunch:1 \
  -m launcher.launch.node \
  --rank=0 \
  --address=10.0.0.4 \
  --endpoint=10.0.0.4:25944 \
  --wait=180 \
  /runs/docker-two-hosts

# Node 1. Follow: docker --host=ssh://me@gpu-b:2222 logs -f sftlaunch-docker-two-hosts-112a9a77
docker --host=ssh://me@gpu-b:2222 rm sftlaunch-docker-two-hosts-112a9a77 >/dev/null 2>&1 || true
docker \
  --host=ssh://me@gpu-b:2222 \
  run \
  --detach \
  --name=sftlaunch-docker-two-hosts-112a9a77 \
  --label=sftlaunch.run=/runs/docker-two-hosts \
  --hostname=gpu-b \
  --network=host \
  --init \
  --stop-timeout=2927 \
  --shm-size=4294967296 \
  --ulimit=memlock=-1 \
  --ulimit=stack=67108864 \
  --user=1000:1000 \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --gpus=8 \
  --mount=type=bind,source=/runs/docker-two-hosts,target=/runs/docker-two-hosts \
  --mount=type=bind,source=/models/llama,target=/models/llama,readonly \
  --mount=type=bind,source=/data/train.jsonl,target=/data/train.jsonl,readonly \
  --env=COMET_API_KEY \
  --env=HF_ENDPOINT \
  --env=HF_HUB_OFFLINE \
  --env=HF_TOKEN \
  --env=MLFLOW_TRACKING_URI \
  --env=WANDB_API_KEY \
  --env=WANDB_MODE \
  --env=WANDB_PROJECT \
  --env=HF_HOME=/runs/docker-two-hosts/cache \
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-two-hosts \
  --workdir=/runs/docker-two-hosts \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  registry.example/sftlaunch:1 \
  -m launcher.launch.node \
  --rank=1 \
  --address=10.0.0.5 \
  --endpoint=10.0.0.4:25944 \
  --wait=180 \
  /runs/docker-two-hosts
