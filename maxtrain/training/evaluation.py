"""Exact scoring of held-out sets: every token once, each document from an empty context."""

import math
from typing import Any

import jax
import numpy as np

from maxtrain.config import schema
from maxtrain.data.evalset import EvalSet
from maxtrain.data.tokenizer import Tokenizer
from maxtrain.training.program import Program, local_rows, put_batch


def make_sets(config: schema.Config, tokenizer: Tokenizer) -> list[EvalSet]:
    """The evaluation sets of a config, prepared."""
    rows = config.eval.batch_size or config.data.batch_size
    shape = config.eval_length, config.eval_stride, rows
    return [EvalSet(name, source, tokenizer, *shape, config.data.cache_dir) for name, source in config.eval.sets.items()]


class Evaluator:
    """Scores sets with one compiled program."""

    def __init__(self, program: Program, sets: list[EvalSet]):
        config = program.config
        self.sets = sets
        if sets:
            rows = config.eval.batch_size or config.data.batch_size
            self.spec = program.batch(rows, config.eval_length)
            self.step = program.lower_eval(rows, config.eval_length).compile()

    def __call__(self, model: Any) -> dict[str, float]:
        """`eval/<set>/loss` in nats a token, `perplexity`, and `bits_per_byte` of the text's UTF-8 bytes."""
        row: dict[str, float] = {}
        for evaluated in self.sets:
            rows = local_rows(self.spec["tokens"])
            loss = tokens = 0.0
            for batch in evaluated.batches(rows):
                sums = jax.device_get(self.step(model, put_batch(batch, self.spec, rows)))
                loss += float(np.float64(sums["loss"]))
                tokens += float(sums["tokens"])
            mean = loss / tokens
            row[f"eval/{evaluated.name}/loss"] = mean
            row[f"eval/{evaluated.name}/perplexity"] = math.exp(min(mean, 700.0))
            row[f"eval/{evaluated.name}/bits_per_byte"] = loss / math.log(2) / evaluated.num_bytes
        return row
