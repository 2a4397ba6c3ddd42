#!/usr/bin/env bash
# Runs the tests on the CPU (those that need a GPU skip themselves): bash tests/run.sh [pytest arguments]
# Sets up the environment first, see tools/setup_env.sh. Paths in the arguments are relative to the repository.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export LCCP_EXTRAS="${LCCP_EXTRAS:+$LCCP_EXTRAS,}test"
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
cd "$root"
# Ranks that wait for one another would wait for ever, hence the limit.
exec "$LCCP_PYTHON" -m pytest --durations=10 --timeout=600 "$@"
