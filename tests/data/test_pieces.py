"""A text in pieces has the tokens of the whole text, for every way in which tokenizers split it; memory is that of a piece."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from maxtrain.data import shards
from maxtrain.data.pieces import Cutter
from maxtrain.data.shards import prepare
from maxtrain.data.tokenizer import ByteTokenizer, JsonTokenizer

WORDS = ["the", "quick", "naïve", "日本語", "😀", "e\u0301", "don't", "1234567", "x" * 70, "...", "\u00a0", "(a)", "▁", "if", "return"]
BLANKS = [" ", " ", " ", "  ", "\n", "\n\n  ", "\t", "\r\n", ""]


def make_text(num_words, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(num_words))


def train(pre_tokenizer, normalizer=None, model="bpe"):
    tokenizer = Tokenizer(models.Unigram() if model == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    kinds = {"bpe": trainers.BpeTrainer, "unigram": trainers.UnigramTrainer}
    keys = {"unk_token": "<unk>"} if model == "unigram" else {}
    trainer = kinds[model](vocab_size=300, special_tokens=["<unk>"], show_progress=False, **keys)
    tokenizer.train_from_iterator([make_text(2000, seed=1)], trainer)
    return json.loads(tokenizer.to_str())


def unsplit(made):
    made["pre_tokenizer"]["split"] = False
    return made


def llama():
    """SentencePiece's BPE as Llama 2 has it: no words, a blank in front."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return train(pre_tokenizers.Metaspace()) | {"pre_tokenizer": None, "normalizer": normalizer}


def crossing():
    """The same with a token that has a blank inside."""
    made = llama()
    made["model"]["vocab"]["e▁"] = len(made["model"]["vocab"])
    made["model"]["merges"].append(["e", "▁"])
    return made


MADE = {
    "GPT-2": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "blank in front": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Metaspace": lambda: train(pre_tokenizers.Metaspace()),
    "Metaspace, not split": lambda: unsplit(train(pre_tokenizers.Metaspace(prepend_scheme="first"))),
    "Unigram, NFKC": lambda: train(pre_tokenizers.Metaspace(), normalizers.NFKC(), "unigram"),
    "Llama 2": llama,
    "stripped": lambda: train(pre_tokenizers.Metaspace(), normalizers.Strip()),
    "a blank inside a token": crossing,
    "all one word": lambda: train(pre_tokenizers.ByteLevel(use_regex=False)),
}


@pytest.mark.parametrize("name", MADE)
def test_pieces_have_the_tokens_of_the_whole(name):
    text, description, grown = make_text(6000), json.dumps(MADE[name]()), []
    chunks = [text[start : start + 777] for start in range(0, len(text), 777)]
    parts = list(Cutter(description).encode(chunks, grown.append, size=4000))
    whole = Tokenizer.from_str(description)
    whole.encode_special_tokens = True
    assert np.concatenate(parts).tolist() == whole.encode(text, add_special_tokens=False).ids
    assert len(parts) > 5
    assert len(grown) < len(parts)


def test_what_cannot_be_cut_is_tokenised_at_once_and_said():
    text, description, grown = "日本語" * 9000, json.dumps(train(pre_tokenizers.ByteLevel())), []
    (ids,) = Cutter(description).encode([text], grown.append, size=4000)
    assert ids.tolist() == Tokenizer.from_str(description).encode(text, add_special_tokens=False).ids
    assert grown == [8000, 16000, 32000]


def test_long_documents_are_prepared_in_pieces(tmp_path, jsonl, monkeypatch):
    """The shard is that of the documents prepared whole."""
    source = jsonl(["short", make_text(4000), "another", make_text(3000, seed=2)])
    (tmp_path / "tokenizer.json").write_text(json.dumps(train(pre_tokenizers.ByteLevel())))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    for name, tokenizer in {"byte": ByteTokenizer(), "json": JsonTokenizer(tmp_path / "tokenizer.json")}.items():
        whole = prepare("s", source, tokenizer, str(tmp_path / name / "whole"))
        with monkeypatch.context() as patch:
            patch.setattr(shards, "CHUNK", 3000)
            patch.setattr("maxtrain.data.documents.CHUNK", 3000)
            patch.setattr("maxtrain.data.pieces.SIZE", 5000)
            pieces = prepare("s", source, tokenizer, str(tmp_path / name / "pieces"))
        for file in ("tokens", "offsets", "meta.json"):
            assert (whole.folder / file).read_bytes() == (pieces.folder / file).read_bytes()
