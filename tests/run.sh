#!/usr/bin/env bash
# Runs the tests on the CPU (those that need a GPU skip themselves): bash tests/run.sh [pytest arguments]
# Sets up the environment first, see tools/setup_env.sh. Paths in the arguments are relative to the repository.
# As many files at a time as there are cores, up to four, a thread each (-n 0: one after the other, in one process).

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export LCCP_EXTRAS="${LCCP_EXTRAS:+$LCCP_EXTRAS,}test"
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
cd "$root"

workers="$(env -u OMP_NUM_THREADS nproc)"  # which would take that variable for an answer
((workers <= 4)) || workers=4
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests that look at a GPU's memory and time have it to themselves.
[[ ! -e /dev/nvidiactl || "${CUDA_VISIBLE_DEVICES-unset}" == "" ]] || workers=0
# Ranks that wait for one another would wait for ever, hence the limit. A file's tests share what they start from, so a
# file stays together; tests/conftest.py says which begin.
exec "$LCCP_PYTHON" -m pytest --durations=10 --timeout=600 -n "$workers" --dist=loadfile --no-loadscope-reorder "$@"
