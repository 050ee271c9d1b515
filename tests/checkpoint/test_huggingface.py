"""Folders in Hugging Face's format: round trips, quantised weights against plain loops, and hostile files."""

import json
import pathlib
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import MIXTURE, MODEL, edit_header, edit_json, make_folder

from maxtrain.checkpoint import huggingface, safetensors, weights
from maxtrain.config import Refused, schema
from maxtrain.data import tokenizer
from maxtrain.models.decoder import Decoder
from maxtrain.models.families.family import function
from maxtrain.parallel.sharding import path_name


def arrays_of(folder, model, layers="unroll"):
    """The parameters of a folder, imported for a model with its layers unrolled or stacked."""
    described = Decoder(model.model_copy(update={"layers": layers}), schema.Precision(compute="float32"), schema.Remat())
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(described)[0]}
    return weights.load(huggingface.Folder(folder), flat)


@pytest.mark.parametrize("model", [MODEL, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_round_trip_is_bit_identical(model, shard_bytes, tmp_path):
    want = make_folder(tmp_path / "m", model, shard_bytes=shard_bytes)
    assert (tmp_path / "m" / huggingface.INDEX).exists() == (shard_bytes == 9000)
    got = arrays_of(tmp_path / "m", model)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    stacked = arrays_of(tmp_path / "m", model, "scan")
    np.testing.assert_array_equal(stacked["body/layers/0/attention/q"][1], want["body/1/layers/0/attention/q"])


def rewrite(folder, change):
    """Rewrite the weights of a folder with its tensors changed."""
    tensors = {name: tensor.read() for name, tensor in safetensors.read_header(folder / huggingface.SINGLE).items()}
    change(tensors)
    safetensors.write(folder / huggingface.SINGLE, {name: a.shape for name, a in tensors.items()}, np.float32, tensors.items())


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_head_beside_a_tied_embedding(tmp_path, caplog, monkeypatch):
    """Left out where it is the embedding, a head of its own where it is not, as in transformers; compared a part at a time."""
    monkeypatch.setattr(safetensors, "PART", 100)
    want = make_folder(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    assert huggingface.Folder(tmp_path / "m").model.tie_embeddings
    arrays_of(tmp_path / "m", MODEL)
    assert not caplog.records
    rewrite(tmp_path / "m", lambda tensors: tensors[HEAD].__setitem__((-1, -1), 7.0))
    model = huggingface.Folder(tmp_path / "m").model
    assert function(model) == function(MODEL.model_copy(update={"tie_embeddings": False}))
    assert [HEAD in record.message for record in caplog.records] == [True]
    got = arrays_of(tmp_path / "m", model)
    np.testing.assert_array_equal(got["embedding"], want["embedding"])
    assert got["head"][-1, -1] == 7.0
    rewrite(tmp_path / "m", lambda tensors: tensors.update({HEAD: tensors[HEAD][:9]}))
    with pytest.raises(Refused, match=r"lm_head\.weight \[9, 32\] belongs to no parameter"):
        arrays_of(tmp_path / "m", MODEL)


def test_a_tied_embedding_under_the_name_of_the_head(tmp_path):
    want = make_folder(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    np.testing.assert_array_equal(arrays_of(tmp_path / "m", MODEL)["embedding"], want["embedding"])


AHEAD = schema.Model(
    vocab_size=97,
    embed=32,
    num_layers=2,
    num_heads=4,
    norm_eps=1e-6,
    tie_embeddings=False,
    mla=schema.Mla(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
    moe=schema.Moe(num_experts=2, experts_per_token=1, mlp=16, shared_mlp=16, routing="sigmoid", balance_rate=0.001, aux_loss=0.0001),
    mtp=schema.Mtp(num_layers=1),
    slots={"layer": schema.Slot(feed_forward="moe")},
)


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_copies_of_multi_token_prediction(name, tmp_path, caplog):
    """Compared with what they repeat; with others the layers are left out if the config says so, and the message says that."""
    make_folder(tmp_path / "m", AHEAD)
    copy = f"model.layers.2.{name}.weight"
    arrays_of(tmp_path / "m", AHEAD)
    rewrite(tmp_path / "m", lambda tensors: tensors.pop(copy))
    arrays_of(tmp_path / "m", AHEAD)  # one of them may be absent
    rewrite(tmp_path / "m", lambda tensors: tensors.update({copy: np.ones((97, 32), np.float32)}))
    with pytest.raises(Refused, match=f"{name}.*num_nextn_predict_layers: 0"):
        arrays_of(tmp_path / "m", AHEAD)
    edit_json(tmp_path / "m" / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    arrays_of(tmp_path / "m", AHEAD.model_copy(update={"mtp": None}))
    assert "multi-token prediction (model.layers.2." in caplog.records[-1].message


def test_a_tensor_in_two_files(tmp_path):
    make_folder(tmp_path / "m")
    data = (tmp_path / "m" / huggingface.SINGLE).read_bytes()
    for file in ("a.safetensors", "b.safetensors"):
        (tmp_path / "m" / file).write_bytes(data)
    names = list(safetensors.read_header(tmp_path / "m" / "a.safetensors"))
    where = dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"}
    (tmp_path / "m" / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(Refused, match="both here"):
        huggingface.Folder(tmp_path / "m")
    (tmp_path / "m" / huggingface.SINGLE).unlink()
    arrays_of(tmp_path / "m", MODEL)
    (tmp_path / "m" / "b.safetensors").write_bytes(data[:-4] + b"1234")
    with pytest.raises(Refused, match=r"b\.safetensors: .* with other numbers"):
        huggingface.Folder(tmp_path / "m")


def test_other_weights_in_the_folder(tmp_path, caplog):
    make_folder(tmp_path / "m")
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (tmp_path / "m" / name).write_bytes(b"")
    huggingface.Folder(tmp_path / "m")
    assert "weights that are not read: consolidated.safetensors, pytorch_model.bin" in caplog.records[-1].message
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="adapter"):
        huggingface.Folder(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    want = make_folder(tmp_path / "m", dtype=dtype)
    got = arrays_of(tmp_path / "m", MODEL)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    np.testing.assert_array_equal(got["embedding"], want["embedding"].astype(kind).astype(np.float32))


def test_the_reference_library_reads_what_we_write(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    want = make_folder(tmp_path / "m")
    got = reference.load_file(tmp_path / "m" / huggingface.SINGLE)
    np.testing.assert_array_equal(got["model.layers.1.self_attn.q_proj.weight"], want["body/1/layers/0/attention/q"].T)


def test_block_fp8():
    draws = np.random.default_rng(0)
    weight = draws.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale = draws.uniform(0.5, 2, (2, 3)).astype(np.float32)
    got = huggingface._block_fp8(weight, scale)
    for row, column in [(0, 0), (127, 128), (128, 127), (199, 299)]:
        assert got[row, column] == np.float32(weight[row, column]) * scale[row // 128, column // 128]


def test_mxfp4():
    draws = np.random.default_rng(0)
    blocks = draws.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = draws.integers(120, 132, (2, 6, 3), dtype=np.uint8)
    got = huggingface._mxfp4(blocks, scales)
    assert got.shape == (2, 96, 6)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for expert, width, out in [(0, 0, 0), (1, 1, 5), (1, 95, 3), (0, 34, 2)]:
        byte = int(blocks[expert, out, width // 32, width % 32 // 2])
        half = byte >> 4 if width % 2 else byte & 15
        value = magnitudes[half & 7] * (-1 if half & 8 else 1) * 2.0 ** (int(scales[expert, out, width // 32]) - 127)
        assert got[expert, width, out] == value


def quantise(folder, change=lambda config: None):
    """Keep one matrix of the folder in DeepSeek's block-fp8."""
    tensors = {name: tensor.read() for name, tensor in safetensors.read_header(folder / huggingface.SINGLE).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    weight, scale = tensors.pop(name).astype(ml_dtypes.float8_e4m3fn), np.full((1, 1), 0.25, np.float32)
    for file, items in {"a.safetensors": {name: weight}, "b.safetensors": tensors | {name + "_scale_inv": scale}}.items():
        shapes = {key: array.shape for key, array in items.items()}
        safetensors.write(folder / file, shapes, next(iter(items.values())).dtype, items.items())
    (folder / huggingface.SINGLE).unlink()
    where = {name: "a.safetensors"} | dict.fromkeys([*tensors, name + "_scale_inv"], "b.safetensors")
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    change(section)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=section))
    return weight.astype(np.float32) * 0.25


def test_quantised_folder(tmp_path):
    make_folder(tmp_path / "m")
    want = quantise(tmp_path / "m")
    np.testing.assert_array_equal(arrays_of(tmp_path / "m", MODEL)["body/0/layers/0/feed_forward/up"], want.T)


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_quantised_parts_of_another_form(kind, tmp_path):
    """Blocks of too few dims, numbers of another format."""
    make_folder(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.update({f"x_{part}": np.zeros(4, np.float32) for part in ("blocks", "scales")}))
    if kind is np.uint8:
        few = {"dtype": "U8", "shape": [16]}
        edit_header(tmp_path / "m" / huggingface.SINGLE, lambda found: [found[f"x_{part}"].update(few) for part in ("blocks", "scales")])
    edit_json(tmp_path / "m" / "config.json", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    with pytest.raises(Refused, match="x is quantised in another way"):
        huggingface.Folder(tmp_path / "m")


OSS = schema.Model(
    vocab_size=97,
    embed=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_length=64,
    qkv_bias=True,
    out_bias=True,
    attention_sinks=True,
    activation="clamped_swiglu",
    tie_embeddings=False,
    moe=schema.Moe(num_experts=3, experts_per_token=2, mlp=32, norm_topk=True, router_bias=True, expert_bias=True),
    slots={"layer": schema.Slot(feed_forward="moe")},
)


@pytest.mark.slow
def test_mxfp4_folder(tmp_path):
    """A folder as GPT-OSS is published, against the unpacking of transformers."""
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    import torch

    want = dict(make_folder(tmp_path / "m", OSS))
    tensors = {name: tensor.read() for name, tensor in safetensors.read_header(tmp_path / "m" / huggingface.SINGLE).items()}
    draws, packed, floats = np.random.default_rng(0), {}, {}
    for name, array in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            floats[name] = array
            continue
        experts, rows, columns = array.shape
        blocks = draws.integers(0, 256, (experts, columns, rows // 32, 16), dtype=np.uint8)
        scales = draws.integers(118, 130, blocks.shape[:3], dtype=np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        whole = convert(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32).numpy()
        assert whole.shape == array.shape
        layer = f"body/{name.split('.')[2]}/layers/0/feed_forward/"
        parts = {"gate": whole[..., 0::2], "up": whole[..., 1::2]} if "gate_up" in name else {"down": whole}
        want |= {layer + part: values for part, values in parts.items()}
    for file, items in {"a.safetensors": floats, "b.safetensors": packed}.items():
        shapes, kind = {key: array.shape for key, array in items.items()}, next(iter(items.values())).dtype
        safetensors.write(tmp_path / "m" / file, shapes, kind, items.items())
    (tmp_path / "m" / huggingface.SINGLE).unlink()
    where = dict.fromkeys(floats, "a.safetensors") | dict.fromkeys(packed, "b.safetensors")
    (tmp_path / "m" / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    edit_json(tmp_path / "m" / "config.json", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    for name, array in arrays_of(tmp_path / "m", OSS).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


@pytest.mark.slow
def test_sentencepiece_model_becomes_a_tokenizer(tmp_path):
    """tokenizer.model alone beside the weights: the folder it is copied to encodes as SentencePiece does."""
    pytest.importorskip("transformers")
    library = pytest.importorskip("sentencepiece")
    lines = [" ".join(words) for words in np.array_split(pathlib.Path(json.__file__).read_text().split(), 40)]
    make_folder(tmp_path / "m")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "m" / "tokenizer"), model_type="bpe", vocab_size=259,
        byte_fallback=False, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    assert huggingface.copy_tokenizer(tmp_path / "m", tmp_path / "out")
    ours = tokenizer.load_saved(tmp_path / "out")
    reference = library.SentencePieceProcessor(model_file=str(tmp_path / "m" / "tokenizer.model"))
    for line in lines:
        assert list(ours.encode(line)) == reference.encode(line)
        assert ours.decode(reference.encode(line)) == line


UNKNOWN = {
    "'awq'": {"quant_method": "awq"},
    r"\[64, 64\]": {"weight_block_size": [64, 64]},
    "one factor for each tensor": {"weight_block_size": None},
    "quant_algo.*NVFP4.* names no quant_method": {"quant_method": None, "quant_algo": "NVFP4"},
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_unknown_quantisation(words, tmp_path):
    make_folder(tmp_path / "m")
    quantise(tmp_path / "m", lambda config: config.update(UNKNOWN[words]))
    with pytest.raises(Refused, match=f"quantization_config.*{words}"):
        huggingface.Folder(tmp_path / "m")


# --------------------------------------------------------------------------------------------------- hostile files


def cut(folder):
    path = folder / huggingface.SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(folder):
    path = folder / huggingface.SINGLE
    path.write_bytes(path.read_bytes()[:60])


def empty(folder):
    (folder / huggingface.SINGLE).write_bytes(b"")


def huge_header(folder):
    path = folder / huggingface.SINGLE
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def header(change):
    def apply(folder):
        edit_header(folder / huggingface.SINGLE, lambda found: change(found["model.norm.weight"]))

    return apply


def overlap(folder):
    def change(found):
        found["model.norm.weight"]["data_offsets"] = [0, 128]

    edit_header(folder / huggingface.SINGLE, change)


def index(target):
    def apply(folder):
        names = list(safetensors.read_header(folder / huggingface.SINGLE))
        (folder.parent / huggingface.SINGLE).write_bytes((folder / huggingface.SINGLE).read_bytes())
        (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))

    return apply


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def pickled(folder):
    (folder / huggingface.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def disguised(folder):
    (folder / huggingface.SINGLE).write_bytes(pickle.dumps(Bomb()))


def missing(folder):
    def change(found):
        found["spare"] = found.pop("model.norm.weight")

    edit_header(folder / huggingface.SINGLE, change)


def reshaped(folder):
    def change(found):
        found["model.layers.0.self_attn.k_proj.weight"]["shape"].reverse()

    edit_header(folder / huggingface.SINGLE, change)


HOSTILE = {
    "cut short": (cut, ["cut short"]),
    "cut within the header": (cut_in_header, ["cut short"]),
    "empty": (empty, ["cut short"]),
    "header of 2**63 bytes": (huge_header, ["does not fit"]),
    "header is no JSON": (
        lambda f: (f / huggingface.SINGLE).write_bytes((4).to_bytes(8, "little") + b"{{{{" * 9),
        ["its header", "not JSON"],
    ),
    "offsets beyond the file": (header(lambda t: t.update(data_offsets=[10**9, 10**9 + 128])), ["lies"]),
    "negative offsets": (header(lambda t: t.update(data_offsets=[-128, 0])), ["lies"]),
    "offsets that do not fit the shape": (header(lambda t: t.update(shape=[10**6])), ["lies"]),
    "offsets that overlap": (overlap, ["lies"]),
    "a shape that overflows": (header(lambda t: t.update(shape=[2**62, 2**62])), ["lies"]),
    "a shape of text": (header(lambda t: t.update(shape="32")), ["lies"]),
    "an unknown format": (header(lambda t: t.update(dtype="F4")), ["'F4'", "allowed"]),
    "index to the folder above": (index("../model.safetensors"), ["outside its folder"]),
    "index to the root": (index("/etc/passwd"), ["outside its folder"]),
    "index to a pickle": (index("weights.bin"), ["pickled"]),
    "index to a file that is not there": (index("model-2.safetensors"), ["cannot be read"]),
    "a pickle instead": (pickled, ["pytorch_model.bin", "not opened"]),
    "a pickle under another name": (disguised, ["safetensors"]),
    "a missing and a surplus tensor": (missing, ["model.norm.weight [32] is missing", "spare", "no parameter"]),
    "a wrong shape": (reshaped, ["k_proj", "[32, 16]", "[16, 32]"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "a config that is deeply nested": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json", "not JSON"]),
    "a config with a negative size": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=-3)),
        ["num_hidden_layers"],
    ),
    "a config of many layers": (lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=900)), ["900 layers"]),
    "a config of another size": (lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=4)), ["layers.3", "missing"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder(name, tmp_path, monkeypatch):
    """A refusal that names the file; no code is run and no output folder is left."""
    from maxtrain.convert import main

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "m")
    damage, words = HOSTILE[name]
    damage(tmp_path / "m")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Refused) as refusal:
        main(["from-hf", str(tmp_path / "m"), str(tmp_path / "out")])
    for word in [str(tmp_path / "m"), *words]:
        assert word in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
