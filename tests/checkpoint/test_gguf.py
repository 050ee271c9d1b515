"""GGUF files: the same model as in Hugging Face's format, every quantisation, and files that are cut short."""

import copy
import struct

import jax
import numpy as np
import pytest
from folders import MIXTURE, MODEL, make_gguf

import maxtrain
from maxtrain.checkpoint import gguf, gguf_header, gguf_tokenizer, huggingface, weights
from maxtrain.config import Refused, load, schema
from maxtrain.models.decoder import Decoder
from maxtrain.models.families.family import function
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import path_name
from maxtrain.training.loop import Trainer

library = pytest.importorskip("gguf")


def arrays_of(path, model):
    described = Decoder(model.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    return weights.load(gguf.File(path), {path_name(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(described)[0]})


@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "mixture"])
def test_import_is_exact(model, tmp_path):
    want = make_gguf(tmp_path / "m.gguf", model)
    assert function(gguf.File(tmp_path / "m.gguf").model) == function(model)
    for name, array in arrays_of(tmp_path / "m.gguf", model).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


def kind_blocks(kind):
    """A model whose matrices are a multiple of the quantisation's block wide."""
    width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]][0]
    return MODEL if width <= 16 else MODEL.model_copy(update={"embed": max(width, 64), "mlp": max(width, 64), "num_layers": 1})


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_quantisations(kind, tmp_path):
    model = kind_blocks(kind)
    want = make_gguf(tmp_path / "m.gguf", model, kind=kind)["body/0/layers/0/feed_forward/up"]
    type_ = library.GGMLQuantizationType[kind]
    expected = library.dequantize(library.quantize(np.ascontiguousarray(want.T), type_), type_).T
    np.testing.assert_array_equal(arrays_of(tmp_path / "m.gguf", model)["body/0/layers/0/feed_forward/up"], expected)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind, tmp_path):
    """The library cannot write them: random blocks stand in for a matrix."""
    type_ = library.GGMLQuantizationType[kind]
    block, size = library.GGML_QUANT_SIZES[type_]
    raw = np.random.default_rng(0).integers(0, 256, (4, 2 * size), dtype=np.uint8)
    writer = library.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=type_)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    _, tensors = gguf_header.read(str(tmp_path / "k.gguf"), library)
    tensor = tensors["blk.0.ffn_up.weight"]
    assert tensor.shape == (4, 2 * block)
    np.testing.assert_array_equal(library.dequantize(tensor.read(str(tmp_path / "k.gguf")), tensor.kind), library.dequantize(raw, type_))


def test_training_starts_from_a_file(tmp_path, cache_dir, monkeypatch):
    make_gguf(tmp_path / "m.gguf", kind="Q8_0")
    start = arrays_of(tmp_path / "m.gguf", MODEL)
    make_mesh = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    keys = {"model.init_from": tmp_path / "m.gguf", "run.dir": tmp_path / "run", "data.cache_dir": cache_dir, "train.steps": 2}
    keys |= {"data.sources": "{s: {kind: synthetic, num_documents: 40, document_length: 60}}", "data.length": 32, "data.batch_size": 8}
    keys |= {"schedule.learning_rate": 1e-6, "metrics.sinks": "[jsonl]", "run.compile_cache": "null", "model.layers": "unroll"}
    trainer = Trainer(load(None, [f"{key}={value}" for key, value in keys.items()]).config)
    trainer.fit()
    assert trainer.config.model.embed == MODEL.embed
    for path, leaf in jax.tree_util.tree_flatten_with_path(trainer.state.model)[0]:
        moved = np.abs(np.asarray(leaf) - np.asarray(start[path_name(path)]))
        assert 0 < moved.max() < 1e-5


def check_logits(got, theirs, tokens):
    """Within 1e-5 of the largest logit, or four times what PyTorch's float32 is from its float64 with the same weights."""
    import torch

    with torch.no_grad():
        want = theirs(tokens).logits.numpy()
        double = copy.deepcopy(theirs).double()
        double.set_experts_implementation("eager")  # the grouped products know no float64
        rounding = np.abs(double(tokens).logits.numpy() - want).max()
    assert np.abs(got - want).max() < max(1e-5 * np.abs(want).max(), 4 * rounding)


@pytest.mark.slow
@pytest.mark.as_users
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_whole_quantised_model_is_that_of_transformers(kind, tmp_path):
    """The same file, read and dequantised by transformers: the same logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = MODEL.model_copy(update={"embed": 256, "mlp": 256, "num_layers": 2})
    make_gguf(tmp_path / "m.gguf", model, kind=kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32", attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 259, (1, 30)).astype(np.int32)
    check_logits(maxtrain.load(tmp_path / "m.gguf")(tokens), theirs, torch.tensor(tokens))


SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97, "intermediate_size": 80}
SIZES |= {"num_hidden_layers": 3, "max_position_embeddings": 64}
GEMMA = SIZES | {"num_hidden_layers": 7, "head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 9}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
OTHERS = {  # architecture: what transformers calls it, its config
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 128}),
    "qwen3moe": ("qwen3_moe", SIZES | EXPERTS | {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 8}),
    "phi3": ("phi3", SIZES | {"pad_token_id": 0}),
}


def write_like(path, architecture, folder):
    """The folder's model as llama.cpp's converter writes it."""
    source = huggingface.Folder(folder)
    model, name = source.model, architecture
    writer = library.GGUFWriter(path, name)
    numbers = {"vocab_size": model.vocab_size, "block_count": model.num_layers, "context_length": model.max_length}
    numbers |= {"embedding_length": model.embed, "feed_forward_length": model.mlp, "attention.head_count": model.num_heads}
    numbers |= {"attention.head_count_kv": model.num_kv_heads, "attention.key_length": model.head_width}
    numbers |= {"attention.value_length": model.head_width, "rope.dimension_count": model.head_width}
    window = next((slot.window for slot in model.slots.values() if slot.window), None)
    numbers |= {"attention.sliding_window": window} if window else {}
    if model.moe is not None:
        numbers |= {"expert_count": model.moe.num_experts, "expert_used_count": model.moe.experts_per_token}
        numbers |= {"expert_feed_forward_length": model.moe.mlp}
    decimals = {"attention.layer_norm_rms_epsilon": model.norm_eps, "rope.freq_base": model.rope.theta}
    decimals |= {"attn_logit_softcapping": model.attention_softcap} if model.attention_softcap else {}
    decimals |= {"final_logit_softcapping": model.final_softcap} if model.final_softcap else {}
    for key, value in numbers.items():
        writer.add_uint32(f"{name}.{key}", value)
    for key, value in decimals.items():
        writer.add_float32(f"{name}.{key}", value)
    kind = next(kind for kind, known in library.MODEL_ARCH_NAMES.items() if known == name)
    table, stacks = library.get_tensor_name_map(kind, model.num_layers), {}
    for tensor in sorted(source.shapes):
        array = source.read(tensor) + (tensor.endswith("norm.weight") and name.startswith("gemma"))
        before, expert, after = tensor.partition(".experts.")
        stacks.setdefault(before + ".experts" + after[after.index(".") :] if expert else tensor, []).append(array)
    for tensor, array in stacks.items():
        whole = np.stack(array) if ".experts." in tensor else array[0]
        writer.add_tensor(table.get_name(tensor, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(whole, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_are_those_of_transformers(architecture, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes = OTHERS[architecture]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "hf")
    write_like(tmp_path / "m.gguf", architecture, tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(1, 97, (2, 40)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    model = maxtrain.load(tmp_path / "m.gguf")
    options = {"dtype": "float32", "attn_implementation": "eager"} | ({"pad_token_id": 0} if family == "phi3" else {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", **options)
    with torch.no_grad():  # so that what is particular to the architecture is not ours alone
        assert np.abs(again(torch.tensor(tokens)).logits.numpy() - want).max() < 1e-5 * np.abs(want).max()
    assert function(gguf.File(tmp_path / "m.gguf").model) == function(huggingface.Folder(tmp_path / "hf").model)
    check_logits(model(tokens), theirs, torch.tensor(tokens))


@pytest.mark.parametrize("share", [0, 0.00001, 0.001, 0.02, 0.5, 0.999])
def test_cut_short(share, tmp_path):
    from maxtrain.convert import main

    make_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Refused, match=r"m\.gguf"):
        main(["from-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def crafted(*parts, version=3, tensors=0, keys=1):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


A = struct.pack("<Q", 1) + b"a"  # a name
ARRAY = A + struct.pack("<I", 9)
INFO = struct.pack("<IQQIQ", 2, 4, 4, 0, 0)  # 4 x 4 float32 at 0
CRAFTED = {
    "an array of 2**62 bytes": crafted(ARRAY, struct.pack("<IQ", 0, 2**62)),
    "an array of 2**61 strings": crafted(ARRAY, struct.pack("<IQ", 8, 2**61)),
    "an array of arrays": crafted(ARRAY, struct.pack("<IQ", 9, 1), struct.pack("<IQ", 9, 1) * 100),
    "a string of 2**63 bytes": crafted(A, struct.pack("<IQ", 8, 2**63)),
    "a name of 2**40 bytes": crafted(struct.pack("<Q", 2**40)),
    "a name that is no UTF-8": crafted(struct.pack("<Q", 1) + b"\xff", struct.pack("<IB", 0, 1)),
    "a type that is not known": crafted(A, struct.pack("<I", 77)),
    "2**40 keys": crafted(keys=2**40),
    "2**40 tensors": crafted(keys=0, tensors=2**40),
    "a key twice": crafted(*[A + struct.pack("<IB", 0, 1)] * 2, keys=2),
    "a tensor twice": crafted(*[A + INFO] * 2, bytes(96), keys=0, tensors=2),
    "a tensor of 2**31 dims": crafted(A, struct.pack("<I", 2**31), bytes(90), keys=0, tensors=1),
    "a tensor of 2**124 numbers": crafted(A, struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0), bytes(96), keys=0, tensors=1),
    "a tensor beyond the file": crafted(A, struct.pack("<IQQIQ", 2, 4, 4, 0, 2**63), bytes(96), keys=0, tensors=1),
    "a tensor of a kind that is not known": crafted(A, struct.pack("<IQQIQ", 2, 4, 4, 999, 0), bytes(96), keys=0, tensors=1),
    "tensors over one another": crafted(A + INFO, A.replace(b"a", b"b") + INFO, bytes(200), keys=0, tensors=2),
    "version 1": crafted(version=1),
    "the other byte order": crafted(version=3 << 24),
    "nothing but its name": b"GGUF",
    "something else": b"GGML",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_header(name, tmp_path):
    """Refused by file at once, whatever its lengths and counts say."""
    (tmp_path / "m.gguf").write_bytes(CRAFTED[name])
    with pytest.raises(Refused, match=r"m\.gguf"):
        gguf.File(tmp_path / "m.gguf")


def test_header_is_that_of_the_library(tmp_path):
    make_gguf(tmp_path / "m.gguf", MIXTURE, kind="Q8_0")
    values, tensors = gguf_header.read(str(tmp_path / "m.gguf"), library)
    reader = library.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values == fields | {key: pytest.approx(value) for key, value in fields.items() if isinstance(value, float)}
    for tensor in reader.tensors:
        ours = tensors.pop(tensor.name)
        assert (ours.kind, ours.start, ours.bytes_shape) == (tensor.tensor_type, tensor.data_offset, tensor.data.shape)
        np.testing.assert_array_equal(ours.read(str(tmp_path / "m.gguf")), tensor.data)
    assert not tensors


def keyed(path, **keys):
    """A file with these keys beside the least that a model has."""
    writer = library.GGUFWriter(path, "llama")
    for step, value in ((writer.add_block_count, 1), (writer.add_embedding_length, 8), (writer.add_feed_forward_length, 8)):
        step(value)
    for name, value in {"llama__attention__head_count": 2, **keys}.items():
        name = name.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((9, 8), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general__type": "adapter"}, "general.type = 'adapter'"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__attention__head_count": 0}, "num_attention_heads = 0"),
        ({"llama__attention__head_count": "two"}, "num_attention_heads = 'two'"),
        ({"llama__rope__freq_base": "high"}, "rope_theta = 'high'"),
        ({"llama__rope__scaling__factor": "x", "llama__rope__scaling__type": "linear"}, "factor = 'x'"),
    ],
)
def test_keys_of_another_kind(keys, words, tmp_path):
    keyed(tmp_path / "m.gguf", **keys)
    with pytest.raises(Refused, match=words):
        gguf.File(tmp_path / "m.gguf")


def test_keys_that_nobody_reads_are_told_or_ignored_by_name(tmp_path, caplog):
    keyed(tmp_path / "m.gguf", someone__made=1, quantize__imatrix__entries_count=2, llama__odd=3, llama__attention__head_count_kv=2)
    with pytest.raises(Refused, match=r"llama\.odd = 3.*\n.*model.ignore_fields=\[llama.odd\]"):
        gguf.File(tmp_path / "m.gguf")
    assert [record.message.split(": ")[1:] for record in caplog.records] == [["keys that are not read", "someone.made"]]
    assert gguf.File(tmp_path / "m.gguf", ["llama.odd"]).model.num_heads == 2


def test_a_flipped_count_is_refused(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[8:16] = (2**40).to_bytes(8, "little")  # number of tensors
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(Refused, match="damaged"):
        gguf.File(tmp_path / "m.gguf")


def test_unknown_metadata_is_refused_by_name(tmp_path):
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_feed_forward_length(8)
    writer.add_float32("llama.logit_scale", 0.5)
    writer.add_tensor("token_embd.weight", np.zeros((9, 8), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(Refused, match=r"llama\.logit_scale = 0\.5"):
        gguf.File(tmp_path / "m.gguf")


END_TOKENS = {
    "llama3": (["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], {"eos": 2}, [2, 0, 1]),
    "by a key": (["<stop>", "</s>"], {"eos": 1, "eot": 0}, [1, 0]),
    "phi": (["<|end|>", "<|endoftext|>"], {"eos": 1}, [1, 0]),
    "harmony": (["<|end|>", "<|return|>", "<|call|>"], {"eos": 1}, [1, 2]),  # <|end|> ends a message, not the answer
    "none": (["a"], {}, []),
}


@pytest.mark.parametrize("name", END_TOKENS)
def test_end_tokens_by_keys_and_by_names(name):
    tokens, ids, ends = END_TOKENS[name]
    assert gguf_tokenizer.end_ids(tokens, [gguf_tokenizer.CONTROL] * len(tokens), ids) == ends


def test_sentencepiece_pieces(tmp_path):
    """Merges follow the scores; blanks and unknown characters come back."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [0.0] * 259 + [-100.0] * 4 + [-3.0, -1.0, -4.0, -5.0, -2.0]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 9],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    from maxtrain.data.tokenizer import load_saved

    assert gguf_tokenizer.save(values, str(tmp_path / "t"), "here")
    tokenizer = load_saved(tmp_path / "t")
    assert tokenizer.encode_prompt("b")[0] == 1  # texts of this kind begin with bos unless a key says no
    assert [pieces[i] for i in tokenizer.encode("abc")] == ["▁", "abc"]  # bc (-1) before ab (-3), then a+bc (-2) before ▁a
    assert tokenizer.decode(tokenizer.encode("ab é cab")) == "ab é cab"
    tokenizer.save(tmp_path / "again")  # the template travels
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load_saved(tmp_path / "again").fingerprint == tokenizer.fingerprint
