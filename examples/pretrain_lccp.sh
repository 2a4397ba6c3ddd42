#!/usr/bin/env bash
# Long-context continual pre-training: sets up the environment, prepares the data, trains, reports.
#
#   bash examples/pretrain_lccp.sh [CONFIG] [--key=value ...]
#
# CONFIG is a YAML file (default: examples/tiny_moe.yaml), looked up in the current directory and then in the
# repository. --key=value overrides a field of it, as in --training.steps=50. Relative paths in either of them (data,
# run directory) are relative to the repository, which everything runs in. Ctrl-C stops all ranks; the same call again
# resumes the run.
#
# GPUS_PER_NODE   ranks on this node (default: one for each GPU; without GPUs, 2 ranks on the CPU)
# NNODES          nodes (default: 1); call this script once on each of them, see examples/slurm/pretrain_lccp.sbatch
# NODE_RANK       number of this node, from 0 (default: 0)
# MASTER_ADDR     host name of node 0 (default: 127.0.0.1)
# MASTER_PORT     a free port there (default: 29500; with a single node, one that is free)
# NCCL_SOCKET_IFNAME (on CPUs: GLOO_SOCKET_IFNAME) names the network interface between nodes where host names mislead.
# The environment is tools/setup_env.sh's, and so are LCCP_EXTRAS, LCCP_VENV and PYTHON.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
caller="$PWD"
config="examples/tiny_moe.yaml"
if [[ "${1:--}" != -* ]]; then
  config="$1"
  shift
fi

help=no
for argument in "$@"; do
  [[ "$argument" != -h && "$argument" != --help ]] || help=yes
done
if [[ "$help" == yes ]]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  echo
fi

# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
cd "$root"
lccp=("$LCCP_PYTHON" -m megatron_lccp.cli)
[[ "$help" == no ]] || exec "${lccp[@]}" train --help

for found in "$config" "$caller/$config" "$root/$config" ""; do
  [[ "$found" != /* || ! -f "$found" ]] || break
done
if [[ -z "$found" ]]; then
  echo "pretrain_lccp: there is no $config in $caller or $root" >&2
  exit 1
fi

nodes="${NNODES:-1}"
gpus="$("$LCCP_PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$found" == "$root/examples/tiny_moe"* && -z "${GPUS_PER_NODE:-}" ]] && ((nodes == 1)); then
  # The small examples are for 2 ranks: on 2 of the GPUs, or on the CPU where there are fewer.
  export GPUS_PER_NODE=2
  if ((gpus < 2)); then
    export CUDA_VISIBLE_DEVICES=
    gpus=0
  fi
fi
ranks="${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 2))}"
if ((gpus > 0)); then
  # Megatron-Core overlaps communication with computation by the order of launches, which one queue preserves.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
else
  threads=$(($(nproc) / ranks))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
fi
if [[ -n "${MASTER_PORT:-}" ]]; then
  port="$MASTER_PORT"
elif ((nodes > 1)); then
  port=29500
else
  port="$("$LCCP_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
fi

# A no-op on prepared data. Told how many ranks will start, it also refuses a layout that does not fit them. Of several
# nodes one prepares, and the others wait for it.
WORLD_SIZE=$((nodes * ranks)) "${lccp[@]}" prepare "$found" "$@"

# A rank that is told to stop finishes its step and saves; torchrun would kill it after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

# torchrun without the trace of its own that would bury a rank's one line; exec, so that a signal reaches it.
exec "$LCCP_PYTHON" "$root/tools/torchrun.py" \
  --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" \
  -m megatron_lccp.cli train "$found" "$@"
