"""GGUF files: the same model as in Hugging Face's format, every quantisation, and files that are cut short."""

import jax
import numpy as np
import pytest
from folders import MIXTURE, MODEL, make_gguf

from maxtrain.checkpoint import gguf, gguf_tokenizer, weights
from maxtrain.config import Refused, schema
from maxtrain.models.decoder import Decoder
from maxtrain.models.families.family import function
from maxtrain.parallel.sharding import path_name

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
    found, _, tensors = gguf._open(str(tmp_path / "k.gguf"))
    tensor = tensors["blk.0.ffn_up.weight"]
    assert tensor.shape == (4, 2 * block)
    np.testing.assert_array_equal(found.dequantize(tensor.read(str(tmp_path / "k.gguf")), tensor.kind), library.dequantize(raw, type_))


@pytest.mark.parametrize("share", [0, 0.00001, 0.001, 0.02, 0.5, 0.999])
def test_cut_short(share, tmp_path):
    from maxtrain.convert import main

    make_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Refused, match=r"m\.gguf"):
        main(["from-gguf", str(tmp_path / "m.gguf"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


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
    assert [pieces[i] for i in tokenizer.encode("abc")] == ["▁", "abc"]  # bc (-1) before ab (-3), then a+bc (-2) before ▁a
    assert tokenizer.decode(tokenizer.encode("ab é cab")) == "ab é cab"
    tokenizer.save(tmp_path / "again")  # the template travels
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load_saved(tmp_path / "again").fingerprint == tokenizer.fingerprint
