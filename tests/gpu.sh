#!/usr/bin/env bash
# Checks what a CPU cannot show, on one NVIDIA GPU (none has run it yet: how long it takes is not
# known); prints one table and exits 0 if all is well. Without a GPU it is skipped, with the reason;
# GPU_TESTS_REQUIRED=1 makes that a failure. Arguments: words of the names of checks, e.g. resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
exec python tests/gpu.py "$@"
