#!/usr/bin/env bash
# Let the planner search mesh, rematerialisation and microbatches for three recipes, and keep its tables in docs/recipes/.
# Needs no TPU; some minutes of one core each. Expected: exit code 0; estimated and compiled GiB within a quarter of each other.
set -euo pipefail
EXTRAS=tpu
source "$(dirname "$0")/../../scripts/environment.sh"
export JAX_PLATFORMS=cpu
while read -r recipe topology; do
  [ $# -eq 0 ] || [[ " $* " == *" $recipe "* ]] || continue
  echo "$recipe on $topology"
  python -m maxtrain.compile "configs/runs/$recipe.yml" "topology=$topology" --plan > "docs/recipes/$recipe-plan.txt"
done <<'END'
llama3.1-8b-v5e-256 v5e:16x16
llama3.1-70b-v5p-512 v5p:8x8x8
qwen3-30b-a3b-v5p-128 v5p:4x4x8
END
