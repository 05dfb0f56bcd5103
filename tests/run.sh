#!/usr/bin/env bash
# The one test command: makes .venv if needed, checks the style (ruff.toml) and runs every test, two
# files at a time. Arguments go to pytest, e.g. bash tests/run.sh -k tokenizer, or -n0 for one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
ruff check .
# in the order of their names: those with few tests, which come last else, are the longest
exec python -m pytest -q -n2 --dist=loadfile --no-loadscope-reorder --durations=10 tests "$@"
