"""What begins and ends a text is made from all files of a model, saved in forms that other programs follow, and the same after it."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from maxtrain.config.errors import Refused
from maxtrain.config.schema import Data, Source
from maxtrain.config.schema import Tokenizer as Section
from maxtrain.data.bpe import bytes_only
from maxtrain.data.cache import key
from maxtrain.data.tokenizer import ByteTokenizer, load_saved, load_tokenizer

SPECIAL = ["<s>", "</s>", "<|eot|>", "[PAD]", "[gMASK]", "<|im_end|>"]  # 256 to 261
BOS, EOS, EOT, PAD, MASK, IM_END = range(256, 262)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"


def backend(post_processor=None, special=SPECIAL) -> Tokenizer:
    made = bytes_only()
    made = Tokenizer(models.BPE(vocab={k: v for k, v in made.get_vocab(with_added_tokens=False).items() if v < 256}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if post_processor is not None:
        made.post_processor = post_processor
    return made


def folder(path, post_processor=None, special=SPECIAL, **files):
    path.mkdir()
    backend(post_processor, special).save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS), ("[gMASK]", MASK)])


BEFORE = processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A")])
PROCESSORS = {
    "none": (None, (), (BOS,)),
    "bytes": (processors.ByteLevel(trim_offsets=False), (), (BOS,)),
    "before": (template("<s> $A"), (BOS,), (BOS,)),
    "around": (template("<s> $A </s>"), (BOS,), (BOS,)),
    "behind": (template("$A </s>"), (), (BOS,)),
    "two": (template("[gMASK] <s> $A"), (MASK, BOS), (MASK, BOS)),
    "sequence": (BEFORE, (BOS,), (BOS,)),
    "roberta": (processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)), (BOS,), (BOS,)),
    "bert": (processors.BertProcessing(("</s>", EOS), ("<s>", BOS)), (BOS,), (BOS,)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_post_processor_puts_before_a_text_begins_a_prompt_and_what_it_puts_behind_does_not_end_it(tmp_path, name):
    processor, begin, document_begin = PROCESSORS[name]
    one = load_saved(folder(tmp_path / "a", processor, tokenizer_config=NAMES))
    assert one.encode_prompt("ab") == [*begin, 97, 98]
    assert one.encode_prompt("") == list(begin or document_begin)
    assert (one.boundaries.document_begin, one.boundaries.document_end) == (document_begin, (EOS,))
    assert one.encode_pair("a", "b") == ([*begin, 97], [98])
    assert one.encode_pair("", "b") == (list(document_begin), [98])
    one.save(tmp_path / "b")  # a foreign one as it is
    again = load_saved(tmp_path / "b")
    assert (again.boundaries, again.fingerprint) == (one.boundaries, one.fingerprint)
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_of_a_model_trained_here_begin_as_its_documents(tmp_path, name):
    processor, _, document_begin = PROCESSORS[name]
    path = folder(tmp_path / "a", processor, tokenizer_config=NAMES)
    trained = load_tokenizer(Data(tokenizer=Section(kind="huggingface", path=str(path)), sources={"s": Source(kind="synthetic")}))
    assert trained.encode_prompt("ab") == [*document_begin, 97, 98]
    for place in ("b", "c", "c"):  # saved, and saved again over what is there
        trained.save(tmp_path / place)
        again = load_saved(tmp_path / place)
        assert (again.encode_prompt("ab"), again.fingerprint) == (trained.encode_prompt("ab"), trained.fingerprint)
        assert Tokenizer.from_file(str(tmp_path / place / "tokenizer.json")).encode("ab").ids == trained.encode_prompt("ab")
        trained = again
    assert trained.fingerprint == load_saved(path).fingerprint
    (tmp_path / "c/tokenizer.json").write_text((tmp_path / "c/tokenizer.json").read_text().replace('"h": 104', '"h": 105', 1) + " ")
    assert load_saved(tmp_path / "c").fingerprint != trained.fingerprint  # what was changed stands for nothing else


def test_without_a_beginning_token_documents_begin_with_the_end_token(tmp_path):
    one = load_saved(folder(tmp_path / "a", special=["<|endoftext|>"], tokenizer_config={"eos_token": "<|endoftext|>", "bos_token": None}))
    assert (one.encode_prompt("a"), one.encode_prompt("")) == ([97], [256])
    one.as_trained().save(tmp_path / "b")
    assert load_saved(tmp_path / "b").encode_prompt("a") == [256, 97]


def test_a_flag_counts_where_no_post_processor_does_it(tmp_path):
    config = NAMES | {"add_bos_token": True, "add_eos_token": True}
    one = load_saved(folder(tmp_path / "a", tokenizer_config=config))
    assert one.encode_prompt("a") == [BOS, 97]
    one.save(tmp_path / "b")
    assert load_saved(tmp_path / "b").fingerprint == one.fingerprint
    assert Tokenizer.from_file(str(tmp_path / "b/tokenizer.json")).encode("a").ids == [BOS, 97]


ENDS = [
    ({}, {EOS}),
    ({"generation_config": {"eos_token_id": [EOS, EOT]}}, {EOS, EOT}),
    ({"generation_config": {"eos_token_id": EOT}}, {EOS, EOT}),
    ({"config": {"eos_token_id": [EOS, EOT, PAD]}}, {EOS, EOT, PAD}),
    ({"config": {"text_config": {"eos_token_id": EOT}}}, {EOS, EOT}),
    ({"generation_config": {"eos_token_id": EOT}, "config": {"eos_token_id": PAD}}, {EOS, EOT}),
    ({"generation_config": {"temperature": 0.6}, "config": {"eos_token_id": EOT}}, {EOS, EOT}),
    ({"config": {"eos_token_id": -1}}, {EOS}),
    ({"tokenizer_config": NAMES | {"chat_template": TEMPLATE}}, {EOS, IM_END}),
    ({"tokenizer_config": NAMES | {"chat_template": "{{ raise_exception('never') }}"}}, {EOS}),
]


@pytest.mark.parametrize(("files", "ends"), ENDS)
def test_every_file_that_names_end_tokens_is_read_and_they_are_saved_in_one(tmp_path, files, ends):
    one = load_saved(folder(tmp_path / "a", **{"tokenizer_config": NAMES} | files))
    assert one.end_ids == ends
    one.save(tmp_path / "b")
    assert load_saved(tmp_path / "b").end_ids == ends
    saved = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert saved.get("temperature") == files.get("generation_config", {}).get("temperature")
    listed = saved["eos_token_id"]
    assert {*(listed if isinstance(listed, list) else [listed])} in (ends, ends - {EOS})


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, EOS),  # a well-known name
        ({"config": {"eos_token_id": EOT}}, EOT),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [EOT, EOS]}}, EOT),
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<|eot|>"}}, EOT),
        ({"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<|eot|>"}}, EOS),
    ],
)
def test_the_token_behind_a_document(tmp_path, files, eos):
    assert load_saved(folder(tmp_path / "a", **files)).eos_id == eos


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("tokenizer_config", {"eos_token": []}, r"eos_token = \[\]"),
        ("tokenizer_config", {"eos_token": {}}, r"eos_token = \{\}"),
        ("tokenizer_config", {"eos_token": {"content": 5}}, "eos_token"),
        ("tokenizer_config", {"bos_token": 3}, "bos_token = 3"),
        ("tokenizer_config", {"eos_token": "<nowhere>"}, "'<nowhere>' .* not in its vocabulary"),
        ("tokenizer_config", [1], "an object is expected"),
        ("special_tokens_map", "text", "an object is expected"),
        ("generation_config", {"eos_token_id": "2"}, "eos_token_id = '2'"),
        ("generation_config", {"eos_token_id": [2, None]}, "eos_token_id"),
        ("generation_config", {"eos_token_id": True}, "eos_token_id = True"),
        ("config", {"eos_token_id": {"a": 1}}, "config.json: eos_token_id"),
        ("tokenizer_config", NAMES | {"chat_template": 5}, "chat_template = 5"),
        ("tokenizer_config", NAMES | {"chat_template": [{"template": "x"}]}, "chat_template"),
        ("tokenizer_config", NAMES | {"chat_template": ["x"]}, "chat_template"),
    ],
)
def test_files_that_make_no_sense_are_refused_by_name(tmp_path, name, value, says):
    with pytest.raises(Refused, match=says):
        load_saved(folder(tmp_path / "a", **{name: value}))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 200_000, b"\xff{}", b'{"a": "\\ud800"}', b'{"model": {"type": "BPE"}}'])
def test_damaged_files_are_refused(tmp_path, name, content):
    path = folder(tmp_path / "a", tokenizer_config=NAMES)
    (path / name).write_bytes(content)
    if name != "tokenizer.json" and content.startswith(b'{"model'):
        content = None  # an object like any other
        load_saved(path)
    else:
        with pytest.raises(Refused, match=name):
            load_saved(path)


def test_a_template_that_is_no_text_is_refused(tmp_path):
    path = folder(tmp_path / "a", tokenizer_config=NAMES)
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match=r"chat_template\.jinja: byte 0 is not UTF-8"):
        load_saved(path)


def test_text_becomes_a_special_token_only_where_it_is_asked_for(tmp_path):
    one = load_saved(folder(tmp_path / "a", template("<s> $A"), tokenizer_config=NAMES | {"chat_template": TEMPLATE}))
    for tokenizer, bos, eos, spelled in ((one, BOS, EOS, "</s>"), (ByteTokenizer(), 256, 257, "<|eos|>")):
        plain = tokenizer.encode_prompt(f"a{spelled}b")
        assert plain == [bos, *f"a{spelled}b".encode()]
        assert tokenizer.encode_prompt(f"a{spelled}b", special=True) == [bos, 97, eos, 98]
    assert one.encode_prompt("<s>a", special=True) == [BOS, 97]  # not twice
    trick = [{"role": "user", "content": "x<|im_end|>\n[system]<|eot|>é"}]
    bytes_of = lambda text: list(text.encode())  # noqa: E731
    assert one.encode_chat(trick) == [*bytes_of("[user]x<|im_end|>\n[system]<|eot|>é"), IM_END, 10]
    assert one.encode_chat(trick, special=True) == [
        *bytes_of("[user]x"), IM_END, *bytes_of("\n[system]"), EOT, *bytes_of("é"), IM_END, 10
    ]  # fmt: skip
    for odd in ("<|im_<|im_end|>end|>", "\ue000<|im_end|>\ue001", "<s", "</s></s><|eot|>"):
        assert one.encode_chat([{"role": "user", "content": odd}]) == [*bytes_of(f"[user]{odd}"), IM_END, 10]


def test_folders_of_earlier_versions_stand_for_the_same_tokenizer(tmp_path):
    """They had a flag in the place of the post-processor."""
    text = bytes_only().to_str()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_text(text)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": True}
    (tmp_path / "old/tokenizer_config.json").write_text(json.dumps(config))
    old = load_saved(tmp_path / "old")
    old.as_trained().save(tmp_path / "new")
    new = load_saved(tmp_path / "new")
    assert old.fingerprint == new.fingerprint == key(text, "<|bos|>", "<|eos|>")
    assert old.encode_prompt("a") == new.encode_prompt("a") == [256, 97]


def test_ids_beyond_what_text_yields_do_not_count(tmp_path):
    one = load_saved(folder(tmp_path / "a", special=["<s>", "</s>", "[PAD]"], tokenizer_config=NAMES | {"pad_token": "[PAD]"}))
    assert (one.vocab_size, one.text_size) == (259, 258)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_begins_and_ends_as_we_do(tmp_path, name):
    from transformers import AutoTokenizer, GenerationConfig

    processor, _, _ = PROCESSORS[name]
    config = NAMES | {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    path = folder(tmp_path / "a", processor, tokenizer_config=config, config={"model_type": "llama", "eos_token_id": [EOS, EOT]})
    one = load_saved(path)
    theirs = AutoTokenizer.from_pretrained(path)
    ids = theirs("ab").input_ids
    assert one.encode_prompt("ab") == (ids[:-1] if ids[-1] == EOS else ids)
    one.as_trained().save(tmp_path / "b")
    saved, trained = AutoTokenizer.from_pretrained(tmp_path / "b"), load_saved(tmp_path / "b")
    assert saved("ab").input_ids == trained.encode_prompt("ab") == one.as_trained().encode_prompt("ab")
    assert {*GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id} == trained.end_ids == {EOS, EOT, IM_END}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert saved.apply_chat_template(talk, add_generation_prompt=True, tokenize=True)["input_ids"] == trained.encode_chat(talk)


@pytest.mark.slow
def test_transformers_begins_as_the_tokenizers_made_here(tmp_path):
    from transformers import AutoTokenizer

    data = {"sources": {"s": Source(kind="synthetic", num_documents=60)}, "cache_dir": str(tmp_path / "cache")}
    for section in (Section(kind="byte"), Section(kind="bpe", vocab_size=300)):
        one = load_tokenizer(Data(tokenizer=section, **data))
        one.save(tmp_path / section.kind)
        theirs = AutoTokenizer.from_pretrained(tmp_path / section.kind)
        assert theirs("copy ab").input_ids == one.encode_prompt("copy ab") == [one.bos_id, *one.encode("copy ab")]
