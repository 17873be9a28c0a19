#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z: node 0 of 1 of a run, for a machine without the launcher.
# It holds all that it needs: the run's files, and what Docker is told. Run it once on the node;
# again after a reboot or a failure, it goes on from the last whole checkpoint.
#   SFTLAUNCH_FIRST_NODE   address of node 0, where docker.addresses did not say it
#   /etc/sftlaunch.env     NAME=value lines: that one, and variables that the spec passes by name
# Follow: docker logs -f sftlaunch-docker-one-node-c536d681   Stop with a checkpoint: docker stop sftlaunch-docker-one-node-c536d681
# What the spec says is literal: a $, a comma or a backslash in it means itself.
# shellcheck disable=SC1003,SC1091,SC2016,SC2054
set -euo pipefail

if [ -r /etc/sftlaunch.env ]; then
  set -a
  . /etc/sftlaunch.env
  set +a
fi

rank=0
run=/runs/docker-one-node
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
inputs=(/data/train.jsonl)
for path in "${inputs[@]}"; do
  [ -e "$path" ] || fail "$path is not on this node; copy it here"
done

# Started by root, as clouds do, the container still has a user of its own: the image's.
user=$(id -u) group=$(id -g) cache=${HOME:-/tmp}/.cache/huggingface
[ "$user" != 0 ] || user=1000 group=1000 cache=/var/lib/sftlaunch/huggingface
# Models and rows of the Hub are kept on the node.
hub=("--mount=type=bind,source=$cache,target=/cache" --env=HF_HOME=/cache)
owned=("$run")
[ ${#hub[@]} = 0 ] || owned+=("$cache")
mkdir -p "${owned[@]}"

# Each in one step: on a file system that the nodes share, all of them write the same.
write() {
  cat >"$run/.$1.$rank" && mv "$run/.$1.$rank" "$run/$1"
}
write plan.json <<'END'
{"strategy":"ddp","reasons":["the whole run fits on each GPU: least communication","64 sequences = 8 micro batch x 1 accumulation x 8 data parallel"],"defaults":{"quantization":"nf4","lora.rank":16,"lora.alpha":32,"lora.dropout":0.0,"lora.target_modules":"all-linear","training.bf16":true,"training.fp16":false,"training.learning_rate":0.0002,"training.num_train_epochs":1.0,"training.max_length":2048,"training.packing":false,"training.optim":"adamw_torch_fused","training.lr_scheduler_type":"cosine","training.warmup_steps":0.03,"training.weight_decay":0.01,"training.max_grad_norm":1.0,"training.seed":42,"training.gradient_checkpointing":true,"loss":"assistant","checkpoints.every_steps":200,"output":"runs/Llama-3.1-8B-qlora","batch.global_batch_size":64},"warnings":[],"topology":{"gpus":8,"nodes":1,"gpus_per_node":8,"data_parallel_size":8,"device":"cuda","replicate_size":1},"batch":{"global_batch_size":64,"micro_batch_size":8,"gradient_accumulation_steps":1,"tokens_per_step":131072},"adapter":{"method":"qlora","use_reentrant":false,"state_dict_type":null,"quant_storage":"uint8","adapter_dtype":"float32","find_unused_parameters":false},"memory":{"gpu_memory_bytes":84943715696,"peak_allocated_bytes":16131956736,"peak_reserved_bytes":18067791544,"low_bytes":14518761062,"high_bytes":22585706131,"fits":true,"parts":{"parameters":5870067712,"gradients":5242880,"optimizer":335544320,"activations":9602334720,"logits":0,"communication":167772160,"workspace":150994944}},"time":{"steps":813,"seconds_per_step":0.5472819748756319,"total_seconds":444.9402455738887,"basis":"estimate: catalogue"},"storage":{"checkpoint_bytes":671088640,"final_bytes":167772160,"total_bytes":2852126720},"offload":"none","worker":{"environment":{"TORCH_FR_BUFFER_SIZE":"2000","TORCH_FR_DUMP_TEMP_FILE":"{run_directory}/logs/flight-recorder-rank-","ACCELERATE_MIXED_PRECISION":"bf16"},"training_arguments":{"learning_rate":0.0002,"num_train_epochs":1.0,"max_length":2048,"packing":false,"optim":"adamw_torch_fused","lr_scheduler_type":"cosine","warmup_steps":0.03,"weight_decay":0.01,"max_grad_norm":1.0,"seed":42,"gradient_checkpointing":true,"bf16":true,"fp16":false,"per_device_train_batch_size":8,"per_device_eval_batch_size":8,"gradient_accumulation_steps":1,"ddp_find_unused_parameters":false,"save_strategy":"steps","save_steps":200,"logging_nan_inf_filter":false,"logging_steps":1,"disable_tqdm":true,"report_to":[],"assistant_only_loss":true,"completion_only_loss":null,"gradient_checkpointing_kwargs":{"use_reentrant":false}},"model":{"path":"meta-llama/Llama-3.1-8B","revision":null,"dtype":"bfloat16","attn_implementation":null,"trust_remote_code":false,"quantization":{"load_in_4bit":true,"bnb_4bit_quant_type":"nf4","bnb_4bit_use_double_quant":true,"bnb_4bit_compute_dtype":"bfloat16","bnb_4bit_quant_storage":"uint8"}},"peft":{"peft_type":"LORA","task_type":"CAUSAL_LM","r":16,"lora_alpha":32,"lora_dropout":0.0,"target_modules":"all-linear"},"dataset":{"path":"/data/train.jsonl","name":null,"split":"train","eval_path":null,"eval_split":null,"eval_share":null,"columns":{}},"loss":"assistant","evaluation":{"every_steps":null,"early_stopping_patience":null,"exact_match":false},"samples":{"prompts":[],"every_steps":null,"max_new_tokens":64},"checkpoints":{"keep":3},"limits":{"stop_after_seconds":null,"stuck_after_seconds":600,"max_restarts":0,"shutdown_timeout_seconds":120,"signals":"SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"},"health":{"policy":"stop"},"resume_from":null},"command":["torchrun","--standalone","--nproc-per-node=8","--shutdown-timeout=120","--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1","-m","launcher.train","/runs/docker-one-node"],"files":{}}
END
write accelerate.yaml <<'END'
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: bf16
num_machines: 1
num_processes: 8
END
write spec.yaml <<'END'
# Resolved by sftlaunch X.Y.Z: every value is explicit.
model:
  path: meta-llama/Llama-3.1-8B
  dtype: bfloat16
  trust_remote_code: false
dataset:
  path: /data/train.jsonl
  split: train
  columns: {}
method: qlora
lora:
  rank: 16
  alpha: 32
  dropout: 0.0
  target_modules: all-linear
quantization: nf4
strategy: ddp
offload: none
hardware:
  gpus: 8
  nodes: 1
  gpus_per_node: 8
  gpu: h100
  device: cuda
batch:
  global_batch_size: 64
  micro_batch_size: 8
training:
  learning_rate: 0.0002
  num_train_epochs: 1.0
  max_length: 2048
  packing: false
  optim: adamw_torch_fused
  lr_scheduler_type: cosine
  warmup_steps: 0.03
  weight_decay: 0.01
  max_grad_norm: 1.0
  seed: 42
  gradient_checkpointing: true
  bf16: true
  fp16: false
loss: assistant
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
  image: registry.example/sftlaunch:1
  mounts:
  - /scratch:/scratch
  environment:
  - HF_TOKEN
  restarts: 5
  hosts: []
output: runs/Llama-3.1-8B-qlora
END
[ "$(id -u)" != 0 ] || chown -R "$user:$group" "${owned[@]}"

devices=(--device=/dev/infiniband)
[ -d /dev/infiniband ] || devices=()
docker rm sftlaunch-docker-one-node-c536d681 >/dev/null 2>&1 || true
exec docker run --detach "${devices[@]}" "${hub[@]}" \
  --name=sftlaunch-docker-one-node-c536d681 \
  --label=sftlaunch.run=/runs/docker-one-node \
  "--hostname=$(uname -n)" \
  --restart=on-failure:5 \
  --init \
  --stop-timeout=150 \
  --shm-size=4294967296 \
  --ulimit=memlock=-1 \
  --ulimit=stack=67108864 \
  "--user=$user:$group" \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --gpus=8 \
  --mount=type=bind,source=/runs/docker-one-node,target=/runs/docker-one-node \
  --mount=type=bind,source=/data/train.jsonl,target=/data/train.jsonl,readonly \
  --mount=type=bind,source=/scratch,target=/scratch \
  --env=COMET_API_KEY \
  --env=HF_ENDPOINT \
  --env=HF_HUB_OFFLINE \
  --env=HF_TOKEN \
  --env=MLFLOW_TRACKING_URI \
  --env=WANDB_API_KEY \
  --env=WANDB_MODE \
  --env=WANDB_PROJECT \
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-one-node \
  --workdir=/runs/docker-one-node \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  "$image" \
  -m \
  launcher.launch.inside \
  /runs/docker-one-node
