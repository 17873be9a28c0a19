#!/usr/bin/env bash
# Made by sftlaunch @VERSION@: node @RANK@ of @NODES@ of a run, for a machine without the launcher.
# It holds all that it needs: the run's files, and what Docker is told. Run it once on the node;
# again after a reboot or a failure, it goes on from the last whole checkpoint.
#   SFTLAUNCH_FIRST_NODE   address of node 0, where docker.addresses did not say it
#   /etc/sftlaunch.env     NAME=value lines: that one, and variables that the spec passes by name
# Follow: docker logs -f @NAME@   Stop with a checkpoint: docker stop @NAME@
# What the spec says is literal: a $, a comma or a backslash in it means itself.
# shellcheck disable=SC1003,SC1091,SC2016,SC2054
set -euo pipefail

if [ -r /etc/sftlaunch.env ]; then
  set -a
  . /etc/sftlaunch.env
  set +a
fi

rank=@RANK@
run=@RUN@
image=@IMAGE@
first=${SFTLAUNCH_FIRST_NODE:-@FIRST@}

fail() {
  printf 'sftlaunch: %s\n' "$1" >&2
  exit 4
}

command -v docker >/dev/null || fail 'there is no docker on this node'
[ "$rank" = 0 ] || [ -n "$first" ] || fail 'where is node 0? Set SFTLAUNCH_FIRST_NODE'
docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" ||
  fail "the image $image cannot be fetched; sftlaunch image build --push NAME, then docker.image"

# A model and rows that lie in the file system are brought here beforehand.
inputs=(@INPUTS@)
for path in "${inputs[@]}"; do
  [ -e "$path" ] || fail "$path is not on this node; copy it here"
done

# Started by root, as clouds do, the container still has a user of its own: the image's.
user=$(id -u) group=$(id -g) cache=${HOME:-/tmp}/.cache/huggingface
[ "$user" != 0 ] || user=@USER@ group=@GROUP@ cache=/var/lib/sftlaunch/huggingface
# Models and rows of the Hub are kept on the node.
hub=(@HUB@)
owned=("$run")
[ ${#hub[@]} = 0 ] || owned+=("$cache")
mkdir -p "${owned[@]}"

# Each in one step: on a file system that the nodes share, all of them write the same.
write() {
  cat >"$run/.$1.$rank" && mv "$run/.$1.$rank" "$run/$1"
}
# @FILES@
[ "$(id -u)" != 0 ] || chown -R "$user:$group" "${owned[@]}"

devices=(@DEVICES@)
[ -d /dev/infiniband ] || devices=()
docker rm @NAME@ >/dev/null 2>&1 || true
exec docker run --detach "${devices[@]}" "${hub[@]}" \
  @OPTIONS@
