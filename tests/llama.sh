#!/usr/bin/env bash
# What export_gguf.py writes, in llama.cpp itself: compiles it once (some minutes), from the registry
# of Python's packages, and compares tokens, greedy answers and logits. A step of .ci/run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
if ! python -c "import llama_cpp" 2> /dev/null; then
    echo "compiling llama.cpp (once)"
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
        python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36
fi
LLAMA_REQUIRED=1 python -m pytest -q tests/test_export_gguf.py -k llama "$@"
