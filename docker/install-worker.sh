#!/bin/sh
# Installs what scores candidates: torch (with CUDA, as PyPI has it for Linux), lm-eval, Ray.
# Usage: install-worker.sh SOURCE     (a checkout of evomerge)
# PYTHON names the interpreter to install into; python3 by default.
set -eu
source=$1
python=${PYTHON:-python3}

"$python" -m pip install --no-cache-dir \
    -c "$source/constraints.txt" -c "$source/docker/constraints.txt" \
    "$source[worker,ray]" 'ray[default]'
"$python" -m pip check
