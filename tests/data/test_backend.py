"""A tokenizer.json that cannot be used is refused in words when it is opened, not in the middle of a text."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from maxtrain.config.errors import Refused
from maxtrain.data.backend import open_backend
from maxtrain.data.bpe import bytes_only
from maxtrain.data.tokenizer import ByteTokenizer, load_saved

WHOLE = json.loads(bytes_only().to_str())
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [], "special_tokens": {}}


def changed(**parts) -> str:
    return json.dumps(WHOLE | parts)


def replacing(*pairs) -> str:
    backend = bytes_only()
    backend.normalizer = normalizers.Sequence([normalizers.Replace(pattern, content) for pattern, content in pairs])
    return backend.to_str()


BAD = {
    "not JSON": ("[" * 200_000, "not a tokenizer.json"),
    "no model": ("{}", "not a tokenizer.json"),
    "no unknown token": (Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).to_str(), "does not work .*UNK"),
    "a panic": (changed(post_processor=TEMPLATE), "not a tokenizer.json|does not work"),
    "dropout": (changed(model=WHOLE["model"] | {"dropout": 0.5}), "dropout = 0.5"),
    "doubling": (replacing(*[("a", "aa")] * 40), "normalizer makes"),
    "a large content": (replacing(("a", "b" * 100_000)), "normalizer makes"),
    "nothing replaced by much": (replacing((Regex("x*"), "b" * 1000)), "normalizer makes"),
    "no tokens": (Tokenizer(models.BPE()).to_str(), "vocabulary is empty"),
    "a huge id": (changed(model=WHOLE["model"] | {"vocab": WHOLE["model"]["vocab"] | {"much": 2**32 - 9}}), "too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_when_opened(name):
    text, says = BAD[name]
    with pytest.raises(Refused, match=f"(?s)here.*({says})"):
        open_backend(text, "here")


def test_replacements_as_published_are_fine():
    open_backend(replacing((" ", "▁"), (Regex(" {2,}"), "▁"), ("``", '"'), ("…", "...")), "here")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", None, 5, b"a"])
def test_what_is_no_text_is_refused(tmp_path, text):
    ByteTokenizer().save(tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").unlink()
    for tokenizer in (ByteTokenizer(), load_saved(tmp_path / "a")):
        for call in (tokenizer.encode, tokenizer.encode_prompt, lambda value, one=tokenizer: one.encode_prompt(value, special=True)):
            if text is None and call != tokenizer.encode:
                continue
            with pytest.raises(Refused, match=r"half of a character|a text is expected"):
                call(text)
