#!/usr/bin/env bash
# Builds the site of docs/ into build/docs/html, with warnings as errors: bash tools/build_docs.sh [FOLDER]
#
# FOLDER   where the site goes (default: build/docs/html); open index.html in it, no server is needed
#
# It sets up the environment with the extra `docs` first, see tools/setup_env.sh; after that it needs no network. The
# pages in docs/generated are written from the code at every build, so they cannot be out of date. A link to a page or a
# heading that is not there fails the build.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="$(realpath -m "${1:-$root/build/docs/html}")"
export LCCP_EXTRAS="${LCCP_EXTRAS:+$LCCP_EXTRAS,}docs"
# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" CUDA_VISIBLE_DEVICES=
"$LCCP_PYTHON" tools/docs_reference.py docs/generated
# -E: pages that are gone since the last build leave no trace. -n: a reference that leads nowhere is a warning too.
"$LCCP_PYTHON" -m sphinx -q -b html -E -n -W --keep-going -d "$root/build/docs/doctrees" docs "$out"
printf '%s\n' "$out/index.html"
