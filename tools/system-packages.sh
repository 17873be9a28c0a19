#!/usr/bin/env bash
# What `make` needs from Debian or Ubuntu: installed where we are root, named where not.
# Arguments: the Python that the virtual environment will use; `servers` for the tests with
# real Slurm and Docker daemons.
set -euo pipefail
python=${1:-}
missing=()
root=$([ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo yes || true)

# The newest Python that this system offers beside an older python3 (Ubuntu 22.04 has 3.10
# and offers 3.11).
offered() {
  for version in 3.13 3.12 3.11; do
    if apt-cache show "python$version-venv" >/dev/null 2>&1; then
      echo "python$version"
      return
    fi
  done
  echo python3
}

if [ -z "$python" ]; then
  echo "no Python 3.11 or newer found (transformers 5.23 asks for it)" >&2
  [ -z "$root" ] || apt-get update -qq
  name=$(offered)
  missing+=("$name" "$name-venv" "$name-dev")
elif ! command -v "$python" >/dev/null; then
  echo "error: PYTHON=$python is not there" >&2
  exit 1
else
  name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$name-venv")
  "$python" - <<'PY' 2>/dev/null || missing+=("$name-dev")
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
fi
# DeepSpeed builds one CPU extension at first use.
command -v g++ >/dev/null || missing+=(g++)
# Those tests bring up a cluster and a daemon of their own, which only root can.
if [ "${2:-}" = servers ] && [ "$(id -u)" = 0 ]; then
  command -v sbatch >/dev/null || missing+=(slurm-wlm)
  command -v munged >/dev/null || missing+=(munge)
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v debootstrap >/dev/null || missing+=(debootstrap)
  command -v ip >/dev/null || missing+=(iproute2)
  command -v iptables >/dev/null || missing+=(iptables)
  # From 23 on Docker's client is a package of its own and builds only with a plugin.
  for name in docker-cli docker-buildx; do
    if apt-cache show "$name" >/dev/null 2>&1 && ! dpkg -s "$name" >/dev/null 2>&1; then
      missing+=("$name")
    fi
  done
fi
[ ${#missing[@]} -eq 0 ] && exit 0
command="apt-get install -y ${missing[*]}"
if [ -n "$root" ]; then
  echo "installing: ${missing[*]}" >&2
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command -qq >/dev/null
else
  echo "error: missing: ${missing[*]}; run: sudo $command" >&2
  exit 1
fi
