"""Score a trained model on the held-out sets of its config: `python -m maxtrain.evaluate RUN`."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from maxtrain.config import cli

USAGE = "python -m maxtrain.evaluate RUN"
COMPRESSORS = {"gzip": lambda data: gzip.compress(data, 9), "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)}


def compressed_bits(documents: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e`, each document compressed by itself, as the model scores it."""
    sizes, total = dict.fromkeys(COMPRESSORS, 0), 0
    for data in documents:
        total += len(data)
        for name, compress in COMPRESSORS.items():
            sizes[name] += len(compress(data))
    return {name: 8 * size / total for name, size in sizes.items()}


def main(argv: Sequence[str]) -> int:
    """Print bits per byte of the model beside those of general compressors on the same bytes; write evaluation.json."""
    arguments = cli.parse(argv, usage=USAGE, positional="RUN", overrides=False)
    from maxtrain.training.evaluation import Evaluator, make_sets
    from maxtrain.training.run import open_run

    program, tokenizer, model, step = open_run(arguments.config)
    sets = make_sets(program.config, tokenizer)
    row = Evaluator(program, sets)(model)
    table = Table(title=f"{arguments.config}, step {step}: bits per byte, each document by itself")
    for column in ("set", "documents", "bytes", "model", *COMPRESSORS):
        table.add_column(column, justify="left" if column == "set" else "right")
    results = {}
    for scored in sets:
        others = compressed_bits(data for _, data in scored.documents())
        found = {key: row[f"eval/{scored.name}/{key}"] for key in ("loss", "perplexity", "bits_per_byte")}
        results[scored.name] = found | others | {"num_documents": scored.num_documents, "num_bytes": scored.num_bytes, "step": step}
        bits = [f"{value:.4f}" for value in (found["bits_per_byte"], *others.values())]
        table.add_row(scored.name, f"{scored.num_documents:,}", f"{scored.num_bytes:,}", *bits)
    Console().print(table)
    with open(os.path.join(arguments.config, "evaluation.json"), "w") as file:
        json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    cli.run(main)
