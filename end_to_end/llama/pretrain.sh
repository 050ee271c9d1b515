#!/usr/bin/env bash
# The whole life of a small Llama: train on the interpreter's own sources, be killed with no warning in the middle, go on,
# score held-out files, write some Python. Fails unless the model beats `xz -9e` and no step stands twice in the metrics.
#
# Expected on Python 3.11 (its standard library is the data, so other versions differ a little), 2 cores, about 5 minutes:
#   bits per byte of 20 held-out files (295,302 bytes): model 1.55, gzip 2.115, xz 2.030
set -euo pipefail
source "$(dirname "$0")/../../scripts/environment.sh"
run=${1:-runs/end-to-end-llama}
[ ! -e "$run" ] || { echo "$run exists: give another folder" >&2; exit 2; }

python -m maxtrain.train configs/runs/quickstart.yml run.dir="$run" checkpoint.every=100 &
trainer=$!
until [ -f "$run/metrics.jsonl" ] && grep -q '"step": 350,' "$run/metrics.jsonl"; do
  kill -0 $trainer # fails when the trainer has ended by itself
  sleep 1
done
kill -9 $trainer && wait $trainer || true
python -m maxtrain.train configs/runs/quickstart.yml run.dir="$run" checkpoint.every=100
python -m maxtrain.evaluate "$run"
python -m maxtrain.decode "$run" --tokens 80 --prompt $'def main():\n    '
python -m maxtrain.report "$run"
python - "$run" <<'CHECK'
import json, sys

rows = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
steps = [row["step"] for row in rows if "loss" in row]
assert steps == list(range(1, 1001)), "a step is missing or stands twice"
found = json.load(open(f"{sys.argv[1]}/evaluation.json"))["stdlib"]
assert found["bits_per_byte"] < found["xz"] < found["gzip"], found
print(f"passed: {found['bits_per_byte']:.3f} bits per byte, xz {found['xz']:.3f}, gzip {found['gzip']:.3f}")
CHECK
