"""How far each family's logits are from those of PyTorch transformers: max |difference| / max |reference|, float32, the largest of
its cases in tests/models/cases; after import, and of what transformers makes of our export.

    python scripts/compare_families.py [MODEL_TYPE ...]
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import tempfile

import jax
import numpy as np
from transformers import AutoModelForCausalLM, logging

from maxtrain.checkpoint import huggingface

PATH = pathlib.Path(__file__).parents[1] / "tests" / "models" / "test_families.py"
sys.path.insert(0, str(PATH.parent))  # for what it shares with the tests beside it
SPEC = importlib.util.spec_from_file_location("family_cases", PATH)
tests = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tests)


def differences(family: str, name: str, folder: pathlib.Path) -> tuple[float, float]:
    """Of our logits and of those of the exported model, relative to the reference."""
    theirs = tests.save(family, name, folder / "theirs")
    source = huggingface.Folder(folder / "theirs")
    tokens = np.random.default_rng(0).integers(0, source.model.vocab_size - 1, (2, tests.LENGTH)).astype(np.int32)
    model, arrays = tests.build(source.model, source)
    ours = jax.jit(lambda model: model.logits(model(tokens, tests.context(tokens)).hidden))(model)
    want = tests.their_logits(theirs, tokens)
    (folder / "ours").mkdir()
    huggingface.write(folder / "ours", source.model, arrays.__getitem__, family=family)
    tests.rename(folder / "ours", tests.LIKE.get(family, family))
    keys = {"attn_implementation": "eager", "dtype": "float32", "pad_token_id": theirs.config.pad_token_id}
    exported = AutoModelForCausalLM.from_pretrained(folder / "ours", **keys)
    return tests.error(np.asarray(ours), want), tests.error(tests.their_logits(exported, tokens), want)


def main() -> None:
    logging.set_verbosity_error()
    print(f"{'family':14} {'import':>8} {'export':>8}  cases")
    for family in sys.argv[1:] or tests.CASES:
        found = []
        for name in tests.CASES[family]:
            with tempfile.TemporaryDirectory() as folder:
                found.append(differences(family, name, pathlib.Path(folder)))
        largest = " ".join(f"{max(column):8.1e}" for column in zip(*found, strict=True))
        print(f"{family:14} {largest}  {len(found)}", flush=True)


if __name__ == "__main__":
    main()
