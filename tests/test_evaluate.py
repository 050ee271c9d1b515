"""Bits per byte of held-out text against numpy, beside those of the compressors' own files."""

import errno
import json
import math
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain import evaluate
from maxtrain.config import load
from maxtrain.data.sources import documents
from maxtrain.ops.attention import Context
from maxtrain.training.run import open_run


@pytest.fixture(scope="module")
def results(trained):
    assert evaluate.main([str(trained)]) == 0
    return json.loads((trained / "evaluation.json").read_text())["held"]


LENGTH, STRIDE = 32, 16


@jax.jit
def logits_of(model, window):
    """Logits [LENGTH, vocab] of one window; what is behind a token does not matter to it."""
    tokens = window[None]
    return model.logits(model(tokens, Context(jnp.arange(LENGTH)[None], jnp.ones_like(tokens))).hidden)[0]


def code_length(model, ids):
    """Nats of ids[1:], by windows that move on by STRIDE; the softmax is numpy's, in float64."""
    total, done = 0.0, 0
    while done < len(ids) - 1:
        until = min(LENGTH if done == 0 else done + STRIDE, len(ids) - 1)
        first = max(0, until - LENGTH)
        window = np.zeros(LENGTH, np.int32)
        window[: until - first] = ids[first:until]
        logits = np.asarray(logits_of(model, window), np.float64)
        log_sums = np.log(np.exp(logits).sum(-1))
        for position in range(done, until):
            total += log_sums[position - first] - logits[position - first, ids[position + 1]]
        done = until
    return total


def test_bits_per_byte_are_the_code_length_of_the_documents(trained, results):
    _, tokenizer, model, step = open_run(str(trained))
    texts = [document.text for document in documents(load(trained / "config.yml").config.eval.sets["held"])]
    nats = sum(code_length(model, [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert results["loss"] == pytest.approx(nats / (num_bytes + len(texts)), rel=1e-5)  # a token a byte, and the end
    assert (results["num_bytes"], results["num_documents"], results["step"]) == (num_bytes, 12, step)


@pytest.mark.slow
def test_results_that_cannot_be_written_are_printed(trained, monkeypatch, capsys):
    def refuse(path, data):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(evaluate, "replace", refuse)
    assert evaluate.main([str(trained)]) == 0
    found = capsys.readouterr()
    assert "held" in found.out
    assert "evaluation.json: not written: Read-only file system" in found.err


def test_results_are_those_of_the_run(trained, results):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/held/loss" in row][-1]
    assert results["loss"] == pytest.approx(last["eval/held/loss"], rel=1e-5)


def test_compressors_are_measured_file_by_file(tmp_path):
    texts = [b"def f(x):\n    return x\n" * 20, b"short", bytes(range(256)) * 4]
    sizes = {}
    for name, command in (("gzip", ["gzip", "-9", "-c", "-n"]), ("xz", ["xz", "-9e", "-c"])):
        sizes[name] = sum(len(subprocess.run(command, input=text, capture_output=True, check=True).stdout) for text in texts)
    found = evaluate.compressed_bits(texts)
    total = sum(map(len, texts))
    assert found == {name: 8 * size / total for name, size in sizes.items()}
