"""Round trips, no special tokens out of text, and the same tokenizer from the same text."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtrain.config.errors import Refused
from maxtrain.config.schema import Data, Source
from maxtrain.config.schema import Tokenizer as Section
from maxtrain.data.bpe import bytes_only
from maxtrain.data.tokenizer import BOS, EOS, ByteTokenizer, JsonTokenizer, load_saved, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode but half surrogate pairs, which are no text
TRAINING = {"synthetic": Source(kind="synthetic", num_documents=200)}


def load(section: Section, cache_dir: str = "unused"):
    return load_tokenizer(Data(tokenizer=section, sources=TRAINING, cache_dir=cache_dir))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load(Section(kind="bpe", vocab_size=400), str(tmp_path_factory.mktemp("cache")))


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_round_trip(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode([256, 97, 195, 257]) == "a\ufffd"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)


def test_special_tokens_in_text_are_text(bpe):
    for text in (EOS, f"a{BOS}b", f"{EOS}{EOS}"):
        ids = bpe.encode(text)
        assert bpe.eos_id not in ids
        assert bpe.bos_id not in ids
        assert bpe.decode(ids) == text
    assert bpe.decode([bpe.bos_id, *bpe.encode("a"), bpe.eos_id]) == "a"


def test_where_a_token_lies_across_the_end_of_a_prompt_each_part_is_encoded_alone(bpe):
    assert len(bpe.encode("copy")) == 1
    context, rest = bpe.encode_pair("co", "py")
    assert (context, rest) == ([bpe.bos_id, *bpe.encode("co")], bpe.encode("py").tolist())
    assert bpe.encode_pair("copy", " ab") == ([bpe.bos_id, *bpe.encode("copy")], bpe.encode(" ab").tolist())


def test_bpe_learns_and_splits_digits(bpe):
    assert bpe.vocab_size == 400
    assert len(bpe.encode("copy abc")) < len("copy abc")
    assert len(bpe.encode("123456")) == 6


def test_bad_data_is_refused_in_training_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{')
    sources = {"a": Source(kind="jsonl", path=str(tmp_path / "a.jsonl"))}
    with pytest.raises(Refused, match=r"a\.jsonl:2"):
        load_tokenizer(Data(tokenizer=Section(kind="bpe", vocab_size=300), sources=sources, cache_dir=str(tmp_path / "cache")))


def test_batch_is_encode_of_each(bpe):
    texts = ["copy one", "", "turn 17\n"]
    for tokenizer in (ByteTokenizer(), bpe):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text).tolist() for text in texts]


def test_bpe_is_deterministic_across_processes(bpe, tmp_path):
    script = f"""
from maxtrain.config.schema import Data, Source, Tokenizer
from maxtrain.data.tokenizer import load_tokenizer
sources = {{"synthetic": Source(kind="synthetic", num_documents=200)}}
print(load_tokenizer(Data(tokenizer=Tokenizer(kind="bpe", vocab_size=400), sources=sources, cache_dir={str(tmp_path)!r})).fingerprint)
"""
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.fingerprint


def test_bpe_is_trained_once(tmp_path, monkeypatch):
    first = load(Section(kind="bpe", vocab_size=300), str(tmp_path))
    monkeypatch.setattr("maxtrain.data.tokenizer._train", "not to be called".format)
    assert load(Section(kind="bpe", vocab_size=300), str(tmp_path)).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_tokenizer_of_the_cache_is_named_and_made_anew(bpe, tmp_path, capsys, name):
    section = Section(kind="bpe", vocab_size=400)
    assert load(section, str(tmp_path)).fingerprint == bpe.fingerprint
    (kept,) = (path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir())
    data = (kept / name).read_bytes()
    for damage in (data[: len(data) // 2], data.replace(b"1", b"2", 1), b""):
        (kept / name).write_bytes(damage)
        assert load(section, str(tmp_path)).fingerprint == bpe.fingerprint
        assert f"{name} has changed" in capsys.readouterr().err
        assert (kept / name).read_bytes() == data


def test_training_text_is_shared_out_by_weight(tmp_path, monkeypatch):
    from maxtrain.data import bpe

    sources = {"a": Source(kind="synthetic", weight=3.0), "b": Source(kind="synthetic")}
    texts = list(bpe.training_text(sources, 4000))
    assert sum(map(len, texts)) == 4000
    start = texts.index(texts[0], 1)  # where the second source begins
    assert sum(map(len, texts[:start])) == 3000


def test_save_and_load(bpe, tmp_path):
    for name, tokenizer in {"byte": ByteTokenizer(), "bpe": bpe}.items():
        tokenizer.save(str(tmp_path / name))
        back = load_saved(str(tmp_path / name))
        assert type(back) is type(tokenizer)
        assert (back.fingerprint, back.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
        assert (back.bos_id, back.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


@given(TEXT)
@settings(max_examples=50, deadline=None)
def test_saved_byte_tokenizer_is_one_for_other_programs_too(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "byte"
    ByteTokenizer().save(folder)
    other = JsonTokenizer(folder / "tokenizer.json")
    assert other.encode(text).tolist() == ByteTokenizer().encode(text).tolist()
    assert (other.vocab_size, other.bos_id, other.eos_id) == (258, 256, 257)


@pytest.mark.parametrize(
    ("config", "bos", "eos"),
    [
        ({"bos_token": None, "eos_token": EOS}, EOS, EOS),
        ({"bos_token": {"content": BOS}, "eos_token": {"content": EOS}}, BOS, EOS),
        ({"bos_token": EOS, "eos_token": BOS}, EOS, BOS),
        (None, BOS, EOS),
    ],
)
def test_huggingface_special_tokens(tmp_path, config, bos, eos):
    bytes_only().save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    ids = {BOS: 256, EOS: 257}
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load(Section(kind="huggingface", path=str(path)))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (ids[bos], ids[eos])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "cannot be read"),
        ("tokenizer.json", "{}", "not a tokenizer.json"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("tokenizer_config.json", '{"eos_token": null}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": "</end>"}', "'</end>'"),
    ],
)
def test_bad_tokenizers_are_refused(tmp_path, name, content, says):
    bytes_only().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=says):
        load(Section(kind="huggingface", path=str(tmp_path)))
