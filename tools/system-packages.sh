#!/usr/bin/env bash
# What `make` needs from Debian or Ubuntu: installed where we are root, named where not.
# Arguments: the Python that the virtual environment will use; `slurm` for the cluster tests.
set -euo pipefail
python=${1:-}
missing=()
if [ -z "$python" ]; then
  echo "no Python 3.11 or newer found (transformers 5.23 asks for it)" >&2
  missing+=(python3 python3-venv python3-dev)
elif ! command -v "$python" >/dev/null; then
  echo "error: PYTHON=$python is not there" >&2
  exit 1
else
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  "$python" - <<'PY' 2>/dev/null || missing+=(python3-dev)
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
fi
# DeepSpeed builds one CPU extension at first use.
command -v g++ >/dev/null || missing+=(g++)
# The Slurm tests bring up a cluster of their own, which only root can.
if [ "${2:-}" = slurm ] && [ "$(id -u)" = 0 ]; then
  command -v sbatch >/dev/null || missing+=(slurm-wlm)
  command -v munged >/dev/null || missing+=(munge)
fi
[ ${#missing[@]} -eq 0 ] && exit 0
command="apt-get install -y ${missing[*]}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing: ${missing[*]}" >&2
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command -qq >/dev/null
else
  echo "error: missing: ${missing[*]}; run: sudo $command" >&2
  exit 1
fi
