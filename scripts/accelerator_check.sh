#!/usr/bin/env bash
# Show what this checkout does on the accelerator of this machine, in under 8 minutes: results against the CPU, speed, serving, a peer.
#   bash scripts/accelerator_check.sh [--peer] [--smoke] [--out FOLDER]
# PYTHON is the interpreter (python3), WHEELS a folder of wheels to use beside its packages. Nothing is installed. See docs/accelerator.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
site=""
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    for wheel in "$WHEELS"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
fi
PYTHONPATH="$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" "$python" scripts/accelerator/run.py "$@"
