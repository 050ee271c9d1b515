#!/usr/bin/env bash
# Compile every recipe for its slice of TPUs and keep the reports in docs/recipes/. Needs no TPU; minutes of one core each.
# Expected: exit code 0, and "together, compiled" below the chip's memory in each report.
set -euo pipefail
EXTRAS=tpu
source "$(dirname "$0")/../../scripts/environment.sh"
export JAX_PLATFORMS=cpu
mkdir -p docs/recipes
while read -r recipe topology; do
  [ $# -eq 0 ] || [[ " $* " == *" $recipe "* ]] || continue
  echo "$recipe on $topology"
  python -m maxtrain.compile "configs/runs/$recipe.yml" "topology=$topology" > "docs/recipes/$recipe.txt"
done <<'END'
llama3.1-8b-v5e-256 v5e:16x16
llama3.1-70b-v5p-512 v5p:8x8x8
gemma3-27b-v6e-256 v6e:16x16
qwen3-30b-a3b-v5p-128 v5p:4x4x8
qwen3-32b-v6e-256 v6e:16x16
deepseek-v3-v5p-1024 v5p:8x8x16
gpt-oss-120b-tpu7x-128 tpu7x:4x4x8
END
