#!/usr/bin/env bash
# From a clean clone to a trained model: install, train on the embedded default, score held-out files, write some Python.
# Arguments go to the training command: scripts/quickstart.sh train.steps=100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
run=runs/quickstart

echo "== Training (configs/runs/quickstart.yml; the same command goes on where it was stopped)"
python -m maxtrain.train configs/runs/quickstart.yml run.dir="$run" "$@"
echo "== Held-out files: the model beside general compressors"
python -m maxtrain.evaluate "$run"
echo "== What it writes"
python -m maxtrain.decode "$run" --tokens 160 --prompt $'"""Read and write configuration files."""\n\nimport ' --prompt $'class Stack:\n    def __init__(self'
python -m maxtrain.report "$run"
