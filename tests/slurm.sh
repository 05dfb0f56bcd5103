#!/usr/bin/env bash
# The tests against a real Slurm, which they start and stop themselves (as root, on Debian).
# Arguments go to pytest, e.g. -k array. Without a way to start one they are skipped, with the
# reason; SLURM_TESTS_REQUIRED=1, as in CI, makes that a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
export SLURM_TEST_FOLDER=${SLURM_TEST_FOLDER:-/tmp/speedrun-slurm}
trap 'bash tests/slurm/stop.sh' EXIT
code=0
bash tests/slurm/start.sh || code=$?
if [ "$code" -eq 77 ] && [ -z "${SLURM_TESTS_REQUIRED:-}" ]; then
    echo "skipped: the line above says why"
    exit 0
fi
if [ "$code" -ne 0 ]; then exit 1; fi
. "$SLURM_TEST_FOLDER/env"
python -m pytest -q -x --durations=0 tests/slurm/scenarios.py "$@" || code=$?
if [ "$code" -ne 0 ]; then
    echo "what Slurm itself wrote last:" >&2
    tail -n 15 "$SLURM_TEST_FOLDER"/log/slurm*.log >&2
fi
exit "$code"
