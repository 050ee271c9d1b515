"""Score a trained model on the held-out sets of its config: `python -m maxtrain.evaluate RUN`."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maxtrain.config import cli
from maxtrain.config.errors import Refused
from maxtrain.data.integrity import replace

USAGE = "python -m maxtrain.evaluate RUN [section.key=value ...]"
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
    """Print bits per byte of the model beside those of general compressors on the same bytes.

    They are kept in the run's folder, if that can be written: in evaluation.json, of a checkpoint that was named in evaluation-STEP.json.
    """
    arguments = cli.parse(argv, usage=USAGE, positional="RUN")
    from maxtrain.training.evaluation import Evaluator, make_sets
    from maxtrain.training.run import locate, open_run

    if arguments.config is None:
        raise Refused(f"no RUN is given\nusage: {USAGE}")
    foreign = [word for word in arguments.overrides if not word.startswith(("eval.", "mesh.", "precision.", "data.cache_dir="))]
    if foreign:
        raise Refused(f"{foreign[0]}: a trained model is scored as it is; only eval, mesh, precision and data.cache_dir can be set")
    folder, named = locate(arguments.config)
    program, tokenizer, model, step = open_run(arguments.config, arguments.overrides)
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
    path = Path(folder, "evaluation.json" if named is None else f"evaluation-{named}.json")
    try:
        replace(path, json.dumps(results, indent=2).encode())
    except OSError as error:
        print(f"{path}: not written: {error.strerror}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
