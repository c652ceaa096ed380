#!/bin/sh
# Installs the controller, the command line and the dashboard: no torch, no model libraries.
# Usage: install-controller.sh SOURCE     (a checkout of evomerge)
# PYTHON names the interpreter to install into; python3 by default.
set -eu
source=$1
python=${PYTHON:-python3}

"$python" -m pip install --no-cache-dir \
    -c "$source/constraints.txt" -c "$source/docker/constraints.txt" \
    "$source[ray,dashboard,postgres]" 'ray[default]'
"$python" -m pip check
