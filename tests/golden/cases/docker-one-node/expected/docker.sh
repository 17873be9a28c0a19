#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z. Starts the run's container in the background.
# Follow: docker logs -f sftlaunch-docker-one-node-c536d681
# Stop with a checkpoint: docker stop sftlaunch-docker-one-node-c536d681
# Remove what has ended: docker rm sftlaunch-docker-one-node-c536d681
set -euo pipefail
docker rm sftlaunch-docker-one-node-c536d681 >/dev/null 2>&1 || true
exec docker \
  run \
  --detach \
  --name=sftlaunch-docker-one-node-c536d681 \
  --label=sftlaunch.run=/runs/docker-one-node \
  --hostname=laptop \
  --restart=on-failure:5 \
  --init \
  --stop-timeout=150 \
  --shm-size=4294967296 \
  --ulimit=memlock=-1 \
  --ulimit=stack=67108864 \
  --user=1000:1000 \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --gpus=8 \
  --mount=type=bind,source=/runs/docker-one-node,target=/runs/docker-one-node \
  --mount=type=bind,source=/data/train.jsonl,target=/data/train.jsonl,readonly \
  --mount=type=bind,source=/home/me/cache,target=/home/me/cache \
  --mount=type=bind,source=/scratch,target=/scratch \
  --env=COMET_API_KEY \
  --env=HF_ENDPOINT \
  --env=HF_HUB_OFFLINE \
  --env=HF_TOKEN \
  --env=MLFLOW_TRACKING_URI \
  --env=WANDB_API_KEY \
  --env=WANDB_MODE \
  --env=WANDB_PROJECT \
  --env=HF_HOME=/home/me/cache \
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-one-node \
  --workdir=/runs/docker-one-node \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  registry.example/sftlaunch:1 \
  -m launcher.launch.inside \
  /runs/docker-one-node
