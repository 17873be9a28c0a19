#!/usr/bin/env bash
# Made by sftlaunch X.Y.Z: node 1 of 2 of a run, for a machine without the launcher.
# It holds all that it needs: the run's files, and what Docker is told. Run it once on the node;
# again after a reboot or a failure, it goes on from the last whole checkpoint.
#   SFTLAUNCH_FIRST_NODE   address of node 0, where docker.addresses did not say it
#   /etc/sftlaunch.env     NAME=value lines: that one, and variables that the spec passes by name
# Follow: docker logs -f sftlaunch-docker-two-nodes-without-ssh-46fe9370   Stop with a checkpoint: docker stop sftlaunch-docker-two-nodes-without-ssh-46fe9370
# What the spec says is literal: a $, a comma or a backslash in it means itself.
# shellcheck disable=SC1003,SC1091,SC2016,SC2054
set -euo pipefail

if [ -r /etc/sftlaunch.env ]; then
  set -a
  . /etc/sftlaunch.env
  set +a
fi

rank=1
run=/runs/docker-two-nodes-without-ssh
image=registry.example/sftlaunch:1
first=${SFTLAUNCH_FIRST_NODE:-10.0.0.4}

fail() {
  printf 'sftlaunch: %s\n' "$1" >&2
  exit 4
}

command -v docker >/dev/null || fail 'there is no docker on this node'
[ "$rank" = 0 ] || [ -n "$first" ] || fail 'where is node 0? Set SFTLAUNCH_FIRST_NODE'
docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" ||
  fail "the image $image cannot be fetched; sftlaunch image build --push NAME, then docker.image"

# A model and rows that lie in the file system are brought here beforehand.
inputs=(/models/llama /data/train.jsonl)
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
{"strategy":"zero3","reasons":["strategy zero3 was asked for","64 sequences = 4 micro batch x 1 accumulation x 16 data parallel"],"defaults":{"quantization":"none","training.bf16":true,"training.fp16":false,"training.learning_rate":2e-05,"training.num_train_epochs":1.0,"training.max_length":2048,"training.packing":false,"training.optim":"adamw_torch_fused","training.lr_scheduler_type":"cosine","training.warmup_steps":0.03,"training.weight_decay":0.01,"training.max_grad_norm":1.0,"training.seed":42,"training.gradient_checkpointing":true,"loss":"assistant","checkpoints.every_steps":200,"output":"runs/llama-full","batch.global_batch_size":64},"warnings":[],"topology":{"gpus":16,"nodes":2,"gpus_per_node":8,"data_parallel_size":16,"device":"cuda","replicate_size":1},"batch":{"global_batch_size":64,"micro_batch_size":4,"gradient_accumulation_steps":1,"tokens_per_step":131072},"adapter":{"method":"full","use_reentrant":false,"state_dict_type":null,"quant_storage":null,"adapter_dtype":null,"find_unused_parameters":false},"memory":{"gpu_memory_bytes":84943715696,"peak_allocated_bytes":15164842496,"peak_reserved_bytes":16984623595,"low_bytes":13648358246,"high_bytes":21296059292,"fits":true,"parts":{"parameters":1003782656,"gradients":0,"optimizer":6022695936,"activations":2415919104,"logits":3621781504,"communication":2067108864,"workspace":33554432}},"time":{"steps":813,"seconds_per_step":0.96363134976,"total_seconds":783.43228735488,"basis":"estimate: catalogue"},"storage":{"checkpoint_bytes":96363134976,"final_bytes":32121044992,"total_bytes":417573584896},"offload":"none","worker":{"environment":{"TORCH_FR_BUFFER_SIZE":"2000","TORCH_FR_DUMP_TEMP_FILE":"{run_directory}/logs/flight-recorder-rank-","ACCELERATE_USE_DEEPSPEED":"true","ACCELERATE_DEEPSPEED_CONFIG_FILE":"{run_directory}/deepspeed.json","ACCELERATE_DEEPSPEED_ZERO3_INIT":"true"},"training_arguments":{"learning_rate":2e-05,"num_train_epochs":1.0,"max_length":2048,"packing":false,"optim":"adamw_torch_fused","lr_scheduler_type":"cosine","warmup_steps":0.03,"weight_decay":0.01,"max_grad_norm":1.0,"seed":42,"gradient_checkpointing":true,"bf16":true,"fp16":false,"per_device_train_batch_size":4,"per_device_eval_batch_size":4,"gradient_accumulation_steps":1,"ddp_find_unused_parameters":false,"save_strategy":"steps","save_steps":200,"logging_nan_inf_filter":false,"logging_steps":1,"disable_tqdm":true,"report_to":[],"assistant_only_loss":true,"completion_only_loss":null,"gradient_checkpointing_kwargs":{"use_reentrant":false}},"model":{"path":"/models/llama","revision":null,"dtype":"float32","attn_implementation":null,"trust_remote_code":false,"quantization":null},"peft":null,"dataset":{"path":"/data/train.jsonl","name":null,"split":"train","eval_path":null,"eval_split":null,"eval_share":null,"columns":{}},"loss":"assistant","evaluation":{"every_steps":null,"early_stopping_patience":null,"exact_match":false},"samples":{"prompts":[],"every_steps":null,"max_new_tokens":64},"checkpoints":{"keep":3},"limits":{"stop_after_seconds":null,"stuck_after_seconds":600,"max_restarts":0,"shutdown_timeout_seconds":2897,"signals":"SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"},"health":{"policy":"stop"},"resume_from":null},"command":["torchrun","--nnodes=2","--rdzv-backend=c10d","--rdzv-endpoint=HEAD_NODE:29500","--rdzv-id=docker-two-nodes-without-ssh","--nproc-per-node=8","--shutdown-timeout=2897","--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1","-m","launcher.train","/runs/docker-two-nodes-without-ssh"],"files":{}}
END
write accelerate.yaml <<'END'
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 2
num_processes: 16
deepspeed_config:
  deepspeed_config_file: /runs/docker-two-nodes-without-ssh/deepspeed.json
  zero3_init_flag: true
END
write spec.yaml <<'END'
# Resolved by sftlaunch X.Y.Z: every value is explicit.
model:
  path: /models/llama
  dtype: float32
  trust_remote_code: false
dataset:
  path: /data/train.jsonl
  split: train
  columns: {}
method: full
lora: {}
quantization: none
strategy: zero3
offload: none
hardware:
  gpus: 16
  nodes: 2
  gpus_per_node: 8
  gpu: h100
  device: cuda
batch:
  global_batch_size: 64
  micro_batch_size: 4
training:
  learning_rate: 2.0e-05
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
  mounts: []
  environment: []
  restarts: 0
  hosts: []
  addresses:
  - 10.0.0.4
  - 10.0.0.5
  port: 29500
output: runs/llama-full
END
write deepspeed.json <<'END'
{
  "bf16": {
    "enabled": "auto"
  },
  "fp16": {
    "enabled": "auto"
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "zero_allow_untested_optimizer": true,
  "zero_optimization": {
    "stage": 3,
    "contiguous_gradients": true,
    "overlap_comm": true,
    "reduce_bucket_size": "auto",
    "stage3_gather_16bit_weights_on_model_save": true,
    "stage3_param_persistence_threshold": "auto",
    "stage3_prefetch_bucket_size": "auto"
  }
}
END
[ "$(id -u)" != 0 ] || chown -R "$user:$group" "${owned[@]}"

devices=(--device=/dev/infiniband)
[ -d /dev/infiniband ] || devices=()
docker rm sftlaunch-docker-two-nodes-without-ssh-46fe9370 >/dev/null 2>&1 || true
exec docker run --detach "${devices[@]}" "${hub[@]}" \
  --name=sftlaunch-docker-two-nodes-without-ssh-46fe9370 \
  --label=sftlaunch.run=/runs/docker-two-nodes-without-ssh \
  "--hostname=$(uname -n)" \
  --network=host \
  --restart=on-failure:3 \
  --init \
  --stop-timeout=2927 \
  --shm-size=4294967296 \
  --ulimit=memlock=-1 \
  --ulimit=stack=67108864 \
  "--user=$user:$group" \
  --read-only \
  --tmpfs=/tmp:exec,mode=1777 \
  --cap-drop=ALL \
  --security-opt=no-new-privileges \
  --gpus=8 \
  --mount=type=bind,source=/runs/docker-two-nodes-without-ssh,target=/runs/docker-two-nodes-without-ssh \
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
  --env=SFTLAUNCH_RUN_DIRECTORY=/runs/docker-two-nodes-without-ssh \
  --workdir=/runs/docker-two-nodes-without-ssh \
  --entrypoint=python \
  --log-opt=max-size=10m \
  --log-opt=max-file=3 \
  "$image" \
  -m \
  launcher.launch.node \
  --rank=1 \
  --address=10.0.0.5 \
  --endpoint=10.0.0.4:29500 \
  --wait=1800 \
  /runs/docker-two-nodes-without-ssh
