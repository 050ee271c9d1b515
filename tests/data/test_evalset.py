"""Every token of every document is scored exactly once, from the document's own context alone."""

import numpy as np
import pytest

from maxtrain.config.schema import Source
from maxtrain.data.evalset import EvalSet
from maxtrain.data.sources import documents
from maxtrain.data.tokenizer import ByteTokenizer

LENGTHS = [1, 2, 3, 5, 6, 7, 8, 9, 14, 15, 16, 17, 30, 31, 64, 2, 4]


def evalset(tmp_path, source, tokenizer, length=8, stride=3, batch_size=4) -> EvalSet:
    return EvalSet("held", source, tokenizer, length=length, stride=stride, batch_size=batch_size, cache_dir=str(tmp_path / "cache"))


def unique_documents() -> list[str]:
    """Documents in which no character occurs twice."""
    starts = 0x4E00 + np.cumsum([0, *LENGTHS])
    return ["".join(map(chr, range(starts[i], starts[i + 1]))) for i in range(len(LENGTHS))]


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (8, 8), (8, 1), (15, 7), (100, 50), (1, 1)])
def test_every_token_is_scored_once_with_its_own_context(tmp_path, jsonl, characters, length, stride):
    texts = unique_documents()
    held = evalset(tmp_path, jsonl(texts), characters, length, stride)
    place = {ord(c): (number, i) for number, text in enumerate(texts) for i, c in enumerate(text)}
    scored = dict.fromkeys([(number, i) for number, text in enumerate(texts) for i in range(len(text) + 1)], 0)
    for batch in held.batches(slice(None)):
        for row, column in np.argwhere(batch["weights"] == 1):
            token, target = int(batch["tokens"][row, column]), int(batch["targets"][row, column])
            previous = place.get(token)
            number, i = place[target] if target != 1 else (previous[0], previous[1] + 1)
            scored[number, i] += 1
            assert (previous == (number, i - 1)) if i else (token == 0)
            # the context: the tokens of this segment up to here are the document's, as many as the stride leaves
            position = int(batch["positions"][row, column])
            assert position == i or position >= length - stride
            context = batch["tokens"][row, column - position : column + 1].tolist()
            assert context == [0, *map(ord, texts[number])][i - position : i + 1]
            assert len(set(batch["segments"][row, column - position : column + 1].tolist())) == 1
    assert set(scored.values()) == {1}


def test_counts_and_padding(tmp_path):
    source = Source(kind="synthetic", num_documents=30, document_length=40)
    held = evalset(tmp_path, source, ByteTokenizer(), length=16, stride=8)
    texts = [document.text.encode() for document in documents(source)]
    batches = list(held.batches(slice(None)))
    assert len(batches) == held.num_batches
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    assert (held.num_documents, held.num_bytes) == (30, sum(map(len, texts)))
    assert sum(batch["weights"].sum() for batch in batches) == held.num_bytes + 30  # each document's end is scored too
    for batch in batches:
        padding = batch["segments"] == 0
        assert not batch["weights"][padding].any()
        assert not batch["tokens"][padding].any()
        assert not batch["source"].any()
        starts = np.diff(batch["segments"], axis=1, prepend=0) > 0
        assert not batch["positions"][starts].any()
    assert [data for _, data in held.documents()] == texts


def test_short_documents_share_windows(tmp_path, jsonl):
    held = evalset(tmp_path, jsonl(["abc"] * 8), ByteTokenizer(), length=8, stride=4, batch_size=4)
    (batch,) = held.batches(slice(None))
    assert batch["segments"].tolist() == [[1] * 4 + [2] * 4] * 4
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 4


@pytest.mark.parametrize("readers", [2, 4])
def test_readers_share_the_rows(tmp_path, readers):
    held = evalset(tmp_path, Source(kind="synthetic", num_documents=9, document_length=40), ByteTokenizer())
    parts = zip(*(held.batches(slice(i * 4 // readers, (i + 1) * 4 // readers)) for i in range(readers)), strict=True)
    for whole, part in zip(held.batches(slice(None)), parts, strict=True):
        for key, value in whole.items():
            assert np.array_equal(value, np.concatenate([reader[key] for reader in part]))
