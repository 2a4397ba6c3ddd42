#!/usr/bin/env bash
# Makes sure that this repository's Python environment exists. Afterwards it is a no-op, without network or Python.
#
#   bash tools/setup_env.sh      sets up and prints the environment's interpreter
#   source tools/setup_env.sh    sets up, puts the environment first in PATH, and sets LCCP_PYTHON to its interpreter
#
# PYTHON         interpreter to build it with (default: python3)
# LCCP_VENV      its directory (default: .venv in the repository); `system`: install into the environment of $PYTHON,
#                say a container's, and keep the torch that is there
# LCCP_EXTRAS    extras of setup.py besides `train`, separated by commas: gpu, container, convert, test, dev
#                (default: none; an environment that only redraws runs is `pip install .`, without this script)
# LCCP_TORCH     torch to install (default: the tested version). Where pip is offered a CPU build of it, pip prefers
#                that one; elsewhere, on Linux, it is a CUDA build of some gigabytes.
# LCCP_SYSTEM_SITE=1   a new environment sees the packages around it, and keeps a torch found among them

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
  # Sourced: a child does the work, so that its shell options do not leak into the caller's shell.
  LCCP_PYTHON="$(bash "${BASH_SOURCE[0]}")" || return
  export LCCP_PYTHON
  [[ "${LCCP_VENV:-}" == system ]] || export PATH="${LCCP_PYTHON%/*}:$PATH"
  return
fi

set -euo pipefail

say() { printf 'setup_env: %s\n' "$*" >&2; }
die() { say "$@" && exit 1; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="${PYTHON:-python3}"
IFS=', ' read -ra extras <<<"train,${LCCP_EXTRAS:-}"

if [[ "${LCCP_VENV:-}" == system ]]; then
  env_python="$(command -v "$python")" || die "there is no $python (set PYTHON)"
  state="$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/.lccp"
else
  venv="$(realpath -m "${LCCP_VENV:-$root/.venv}")"
  env_python="$venv/bin/python"
  state="$venv/.lccp"
fi

# What an installed environment was installed from; `installed` holds this and, one a line, the extras.
sources=("$root/setup.py" "$root/pyproject.toml" "${BASH_SOURCE[0]}")
key="$(cat "${sources[@]}" - <<<"$root $env_python ${LCCP_TORCH:-}" | sha256sum)"

is_installed() {
  local line
  for line in "$key" "${extras[@]}"; do
    grep -qxF -- "$line" "$state/installed" 2>/dev/null || return 1
  done
}

check_python() {
  command -v "$python" >/dev/null || die "there is no $python (set PYTHON)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python 3.10 or newer is needed, and $python is $("$python" -V 2>&1) (set PYTHON)"
}

pip() { "$env_python" -m pip --disable-pip-version-check --quiet "$@" >&2; }

contents() { find "$venv" -mindepth 1 -maxdepth 1 ! -name .lccp "$@"; }

# A new environment, or one whose set-up was cut short, or that was moved: scripts in it name its path.
make_venv() {
  [[ -x "$env_python" && -s "$state/installed" && "$(cat "$state/owner")" == "$venv" ]] && return
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module (on Debian and Ubuntu: apt-get install python3-venv)"
  rm -f "$state/installed"
  printf '%s\n' "$venv" >"$state/owner"  # first, so that whatever follows is known to be ours to remove
  contents -exec rm -rf {} +
  "$python" -m venv ${LCCP_SYSTEM_SITE:+--system-site-packages} "$venv"
}

# Makes sure that there is a torch, and writes down what the installation of the rest must leave as it is.
install_torch() {
  # Megatron-Core 0.16.1 was tested with torch 2.13.0, and 0.19.2 with 2.15.0.
  local kept='^torch==' torch="torch==2.13.0"
  ! "$env_python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || torch="torch==2.15.0"
  if { [[ "$ours" == no ]] || grep -q '^include-system-site-packages = true' "$venv/pyvenv.cfg"; } &&
    "$env_python" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then
    # A container's packages are built against one another.
    kept='^(torch|torchvision|torchaudio|triton|pytorch-triton|transformer[-_]engine[^=]*|flash[-_]attn|apex|numpy)=='
  else
    pip install "${LCCP_TORCH:-$torch}" "setuptools>=64"
  fi
  "$env_python" -m pip list --format=freeze 2>/dev/null | grep -iE "$kept" >"$state/constraints.txt"
}

if ! is_installed; then
  check_python
  ours=no
  if [[ "${LCCP_VENV:-}" != system ]]; then
    if [[ -e "$state/owner" || ! -d "$venv" || -z "$(contents -print -quit)" ]]; then
      ours=yes
    elif [[ ! -x "$env_python" ]]; then
      die "$venv is neither empty nor a Python environment (set LCCP_VENV)"
    fi
  fi
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock 9
  if ! is_installed; then  # by somebody else, while we waited
    say "installing into ${venv:-the environment of $python}; this takes a few minutes"
    [[ "$ours" == no ]] || make_venv
    while read -r extra; do extras+=("$extra"); done < <(tail -n +2 "$state/installed" 2>/dev/null)
    mapfile -t extras < <(printf '%s\n' "${extras[@]}" | sort -u | sed '/^$/d')
    rm -f "$state/installed"  # until everything is there again

    install_torch
    # Transformer Engine is compiled against the torch just installed: no isolated build, so its tools come first.
    [[ " ${extras[*]} " != *" gpu "* ]] || pip install wheel ninja pybind11 packaging
    pip install --no-build-isolation --constraint "$state/constraints.txt" \
      --editable "$root[$(IFS=, && echo "${extras[*]}")]"

    printf '%s\n' "$key" "${extras[@]}" >"$state/installed.new"
    mv "$state/installed.new" "$state/installed"
  fi
fi
printf '%s\n' "$env_python"
