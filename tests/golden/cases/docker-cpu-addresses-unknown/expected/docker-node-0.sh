#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z: node 0 of 2 of a run, for a machine without the launcher.
# It holds all that it needs: the run's files, and what Docker is told. Run it once on the node;
# again after a reboot or a failure, it goes on from the last whole checkpoint.
#   SFTLAUNCH_FIRST_NODE   address of node 0, where docker.addresses did not say it
#   /etc/sftlaunch.env     NAME=value lines: that one, and variables that the spec passes by name
# Follow: docker logs -f sftlaunch-docker-cpu-addresses-unknown-60a17819   Stop with a checkpoint: docker stop sftlaunch-docker-cpu-addresses-unknown-60a17819
# What the spec says is literal: a $, a comma or a backslash in it means itself.
# shellcheck disable=SC1003,SC1091,SC2016,SC2054
set -euo pipefail

if [ -r /etc/sftlaunch.env ]; then
  set -a
  . /etc/sftlaunch.env
  set +a
fi

rank=0
run=/runs/docker-cpu-addresses-unknown
image=registry.example/sftlaunch:1
first=${SFTLAUNCH_FIRST_NODE:-}

fail() {
  printf 'sftlaunch: %s\n' "$1" >&2
  exit 4
}

command -v docker >/dev/null || fail 'there is no docker on this node'
[ "$rank" = 0 ] || [ -n "$first" ] || fail 'where is node 0? Set SFTLAUNCH_FIRST_NODE'
docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" ||
  fail "the image $image cannot be fetched; sftlaunch image build --push NAME, then docker.image"

# A model and rows that lie in the file system are brought here beforehand.
inputs=(/models/tiny /data/train.jsonl)
for path in "${inputs[@]}"; do
  [ -e "$path" ] || fail "$path is not on this node; copy it here"
done

# Started by root, as clouds do, the container still has a user of its own: the image's.
user=$(id -u) group=$(id -g) cache=${HOME:-/tmp}/.cache/huggingface
[ "$user" != 0 ] || user=1000 group=1000 cache=/var/lib/sftlaunch/huggingface
# Models and rows of the Hub are kept on the node.
hub=()
owned=("$run")
[ ${#hub[@]} = 0 ] || owned+=("$cache")
mkdir -p "${owned[@]}"

# Each in one step: on a file system that the nodes share, all of them write the same.
write() {
  cat >"$run/.$1.$rank" && mv "$run/.$1.$rank" "$run/$1"
}
write plan.json <<'END'
{"strategy":"fsdp","reasons":["strategy fsdp was asked for","64 sequences = 16 micro batch x 1 accumulation x 4 data parallel"],"defaults":{"quantization":"none","training.bf16":false,"training.fp16":false,"training.learning_rate":2e-05,"training.num_train_epochs":1.0,"training.max_length":512,"training.packing":false,"training.optim":"adamw_torch_fused","training.lr_scheduler_type":"cosine","training.warmup_steps":0.03,"training.weight_decay":0.01,"training.max_grad_norm":1.0,"training.seed":42,"training.gradient_checkpointing":false,"loss":"completion","checkpoints.every_steps":200,"batch.global_batch_size":64},"warnings":[],"topology":{"gpus":4,"nodes":2,"gpus_per_node":2,"data_parallel_size":4,"device":"cpu","replicate_size":1},"batch":{"global_batch_size":64,"micro_batch_size":16,"gradient_accumulation_steps":1,"tokens_per_step":32768},"adapter":{"method":"full","use_reentrant":false,"state_dict_type":"FULL_STATE_DICT","quant_storage":null,"adapter_dtype":null,"find_unused_parameters":false},"memory":{"gpu_memory_bytes":null,"peak_allocated_bytes":141113312,"peak_reserved_bytes":158046909,"low_bytes":127001980,"high_bytes":1261916425,"fits":null,"parts":{"parameters":133440,"gradients":107680,"optimizer":266880,"activations":106168320,"logits":0,"communication":882560,"workspace":33554432}},"time":{"steps":38,"seconds_per_step":null,"total_seconds":null,"basis":"unknown: GPU"},"storage":{"checkpoint_bytes":1601280,"final_bytes":533760,"total_bytes":6938880},"offload":"none","worker":{"environment":{"ACCELERATE_TORCH_DEVICE":"cpu","DS_ACCELERATOR":"cpu","ACCELERATE_MIXED_PRECISION":"no","ACCELERATE_USE_FSDP":"true","FSDP_VERSION":"2","FSDP_RESHARD_AFTER_FORWARD":"true","FSDP_AUTO_WRAP_POLICY":"TRANSFORMER_BASED_WRAP","FSDP_STATE_DICT_TYPE":"FULL_STATE_DICT","FSDP_CPU_RAM_EFFICIENT_LOADING":"false","FSDP_ACTIVATION_CHECKPOINTING":"false","FSDP_OFFLOAD_PARAMS":"false","FSDP_TRANSFORMER_CLS_TO_WRAP":"LlamaDecoderLayer"},"training_arguments":{"learning_rate":2e-05,"num_train_epochs":1.0,"max_length":512,"packing":false,"optim":"adamw_torch_fused","lr_scheduler_type":"cosine","warmup_steps":0.03,"weight_decay":0.01,"max_grad_norm":1.0,"seed":42,"gradient_checkpointing":false,"bf16":false,"fp16":false,"per_device_train_batch_size":16,"per_device_eval_batch_size":16,"gradient_accumulation_steps":1,"ddp_find_unused_parameters":false,"save_strategy":"steps","save_steps":200,"logging_nan_inf_filter":false,"logging_steps":1,"disable_tqdm":true,"report_to":[],"assistant_only_loss":false,"completion_only_loss":true,"use_cpu":true,"accelerator_config":{"use_configured_state":true}},"model":{"path":"/models/tiny","revision":null,"dtype":"float32","attn_implementation":null,"trust_remote_code":false,"quantization":null},"peft":null,"dataset":{"path":"/data/train.jsonl","name":null,"split":"train","eval_path":null,"eval_split":null,"eval_share":null,"columns":{}},"loss":"completion","evaluation":{"every_steps":null,"early_stopping_patience":null,"exact_match":false},"samples":{"prompts":[],"every_steps":null,"max_new_tokens":64},"checkpoints":{"keep":3},"limits":{"stop_after_seconds":null,"stuck_after_seconds":600,"max_restarts":0,"shutdown_timeout_seconds":120,"signals":"SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"},"health":{"policy":"stop"},"resume_from":null},"command":["torchrun","--nnodes=2","--rdzv-backend=c10d","--rdzv-endpoint=HEAD_NODE:29500","--rdzv-id=docker-cpu-addresses-unknown","--nproc-per-node=2","--shutdown-timeout=120","--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1","-m","launcher.train","/runs/docker-cpu-addresses-unknown"],"files":{}}
END
write accelerate.yaml <<'END'
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 2
num_processes: 4
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_activation_checkpointing: false
  fsdp_offload_params: false
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
END
write spec.yaml <<'END'
# Resolved by sftlaunch X.Y.Z: every value is explicit.
model:
  path: /models/tiny
  dtype: float32
  trust_remote_code: false
dataset:
  path: /data/train.jsonl
  split: train
  columns: {}
method: full
lora: {}
quantization: none
strategy: fsdp
offload: none
hardware:
  gpus: 4
  nodes: 2
  gpus_per_node: 2
  device: cpu
batch:
  global_batch_size: 64
  micro_batch_size: 16
training:
  learning_rate: 2.0e-05
  num_train_epochs: 1.0
  max_length: 512
  packing: false
  optim: adamw_torch_fused
  lr_scheduler_type: cosine
  warmup_steps: 0.03
  weight_decay: 0.01
  max_grad_norm: 1.0
  seed: 42
  gradient_checkpointing: false
  bf16: false
  fp16: false
loss: completion
checkpoints:
  every_steps: 200
  keep: 3
limits:
  max_restarts: 0
  stuck_after: 10m
health:
  policy: stop
evaluation:
  exact_match: false
samples:
  prompts: []
  max_new_tokens: 64
trackers: []
slurm:
  gpus_as: gres
  exclusive: false
  mail:
    events: []
  requeue: true
  max_requeues: 20
  prepare: step
  directives: {}
  before: []
docker:
  mounts: []
  environment: []
  restarts: 0
  hosts: []
output: /shared/it's a "$run"
END
[ "$(id -u)" != 0 ] || chown -R "$user:$group" "${owned[@]}"

devices=()
[ -d /dev/infiniband ] || devices=()
docker rm sftlaunch-docker-cpu-addresses-unknown-60a17819 >/dev/null 2>&1 || true
exec docker run --detach "${devices[@]}" "${hub[@]}" \
  --name=sftlaunch-docker-cpu-addresses-unknown-60a17819 \
  --label=sftlaunch.run=/runs/docker-cpu-addresses-unknown \
  "--hostname=$(uname -n)" \
  --network=host \
  --restart=on-failure:3 \
  --init \
  --stop-timeout=150 \
  --shm-size=1073741824 \
  "--user=$user:$group" \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --mount=type=bind,source=/runs/docker-cpu-addresses-unknown,target=/runs/docker-cpu-addresses-unknown \
  --mount=type=bind,source=/models/tiny,target=/models/tiny,readonly \
  --mount=type=bind,source=/data/train.jsonl,target=/data/train.jsonl,readonly \
  --env=COMET_API_KEY \
  --env=HF_ENDPOINT \
  --env=HF_HUB_OFFLINE \
  --env=HF_TOKEN \
  --env=MLFLOW_TRACKING_URI \
  --env=WANDB_API_KEY \
  --env=WANDB_MODE \
  --env=WANDB_PROJECT \
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-cpu-addresses-unknown \
  --workdir=/runs/docker-cpu-addresses-unknown \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  "$image" \
  -m \
  launcher.launch.node \
  --rank=0 \
  --address= \
  --endpoint=:30657 \
  --wait=1800 \
  /runs/docker-cpu-addresses-unknown
