#!/usr/bin/env bash
# The one test command: makes .venv if needed, checks the style (ruff.toml) and runs every test.
# Arguments go to pytest, e.g. bash tests/run.sh -k tokenizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
ruff check .
exec python -m pytest -q --durations=10 tests "$@"
