"""Folders for images or sound with a language model in them: it alone is read, the rest is told, and written again where asked."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import MODEL, edit_json, make_folder

from maxtrain.checkpoint import huggingface, safetensors, weights
from maxtrain.config import Refused, load, schema
from maxtrain.models import families
from maxtrain.models.decoder import Decoder
from maxtrain.models.families import wrapper
from maxtrain.models.families.family import function
from maxtrain.ops.attention import Context
from maxtrain.parallel.sharding import path_name

VISION = {"vision_tower.blocks.0.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "projector.bias": np.ones(4, ml_dtypes.bfloat16)}
PREFIXES = {"published": ("language_model.model.", "language_model.lm_head.weight"), "today": ("model.language_model.", "lm_head.weight")}
UNTIED = MODEL.model_copy(update={"tie_embeddings": False})


def wrap(folder, model, prefix, kind="llava"):
    """A folder with a language model in it; its parameters."""
    want = make_folder(folder, model)
    body, head = PREFIXES[prefix]
    path = folder / huggingface.SINGLE
    tensors = {name: tensor.read() for name, tensor in safetensors.read_header(path).items()}
    tensors = {head if name == "lm_head.weight" else body + name.removeprefix("model."): array for name, array in tensors.items()}
    tensors |= VISION
    shapes = {name: array.shape for name, array in tensors.items()}
    safetensors.write(path, shapes, {name: array.dtype for name, array in tensors.items()}, tensors.items())
    inner = json.loads((folder / "config.json").read_text())
    config = {"model_type": kind, "vision_config": {"hidden_size": 3}, "image_token_index": 5, "text_config": inner, "vocab_size": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    return want


def arrays_of(source):
    described = Decoder(source.model.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    return weights.load(source, {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(described)[0]})


@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_language_model_is_read_and_the_rest_kept(prefix, model, tmp_path, caplog):
    want = wrap(tmp_path / "m", model, prefix)
    source = huggingface.Folder(tmp_path / "m")
    assert function(source.model) == function(model)
    assert "left out are the tensors 1 of projector, 1 of vision_tower" in caplog.records[-1].message
    for name, array in arrays_of(source).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
    changed = {name: array + 1 for name, array in want.items()}
    (tmp_path / "out").mkdir()
    config = huggingface.write(tmp_path / "out", model, changed.__getitem__, around=source, shard_bytes=9000)
    assert (config["model_type"], config["image_token_index"]) == ("llava", 5)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 3}'
    again = huggingface.Folder(tmp_path / "out")
    assert again.names == source.names
    assert function(again.model) == function(model)
    for name, array in arrays_of(again).items():
        np.testing.assert_array_equal(array, changed[name], err_msg=name)
    for name, array in VISION.items():
        assert again.others[name].dtype == array.dtype
        np.testing.assert_array_equal(again.others[name].read(), array)


def test_what_cannot_be_put_around(tmp_path):
    wrap(tmp_path / "m", MODEL, "published")
    make_folder(tmp_path / "plain")
    with pytest.raises(Refused, match="no wrapper"):
        huggingface.Folder(tmp_path / "plain").check_inside(MODEL)
    with pytest.raises(Refused, match=r"(?s)another one.*mlp: 50 in the model, 48 here"):
        huggingface.Folder(tmp_path / "m").check_inside(MODEL.model_copy(update={"mlp": 50}))


def test_refused_wrappers(tmp_path):
    wrap(tmp_path / "m", MODEL, "published")
    edit_json(tmp_path / "m" / "config.json", lambda config: config["text_config"].update(odd=1))
    with pytest.raises(Refused, match=r"config\.json: text_config: odd = 1.*\n.*model.ignore_fields=\[odd\]"):
        huggingface.Folder(tmp_path / "m")
    huggingface.Folder(tmp_path / "m", ["odd"])
    edit_json(tmp_path / "m" / "config.json", lambda config: config["text_config"].update(model_type="qwen2_vl_text"))
    with pytest.raises(Refused, match="text_config: model_type = 'qwen2_vl_text' is not supported"):
        huggingface.Folder(tmp_path / "m")
    with pytest.raises(Refused, match=r"no tensor ends with embed_tokens\.weight"):
        wrapper.names_among(["a"], "here")
    with pytest.raises(Refused, match=r"a\.embed_tokens\.weight, b\.embed_tokens\.weight could be it"):
        wrapper.names_among(["a.embed_tokens.weight", "b.embed_tokens.weight"], "here")
    with pytest.raises(Refused, match="both sides"):
        families.read({"model_type": "paligemma", "text_config": {"model_type": "gemma"}})


# As published, with the sizes that they leave to the classes
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}
LLAVA = {
    "model_type": "llava",
    "pad_token_id": 32001,
    "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {},
}


def test_published_wrappers():
    preset = load("configs/models/gemma3-4b.yml").config.model
    found = families.read(GEMMA3_4B)[1]
    assert function(found.model_copy(update={"vocab_size": preset.vocab_size})) == function(preset)
    llava = families.read(LLAVA)[1]
    assert (llava.embed, llava.num_layers, llava.num_heads, llava.mlp, llava.tie_embeddings) == (4096, 32, 32, 11008, False)


@pytest.mark.slow
def test_sizes_left_out_are_those_of_the_classes():
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    for name, sizes in wrapper.DEFAULTS.items():
        config = AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(name, name))
        assert sizes == tuple(getattr(config, size) for size in wrapper.SIZES), name
    for name, inner in wrapper.LANGUAGE_MODELS.items():
        assert AutoConfig.for_model(name).text_config.model_type == inner, name


SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 99, "head_dim": 12}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
WRAPPERS = {
    "gemma3": {"text_config": SMALL | {"sliding_window": 8}, "vision_config": SIGHT, "mm_tokens_per_image": 4},
    "mistral3": {"text_config": SMALL, "vision_config": SIGHT},
    "llava": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": SIGHT | {"model_type": "clip_vision_model"}},
    "internvl": {"text_config": SMALL | {"model_type": "qwen2"}, "vision_config": SIGHT | {"image_size": [16, 16], "patch_size": [8, 8]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAPPERS)
def test_logits_and_export_against_transformers(kind, tmp_path):
    """A wrapper with random weights: logits of text, before and after it is written again around the same language model."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind]), attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 90, (2, 31)).astype(np.int32)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    source = huggingface.Folder(tmp_path / "theirs")
    described = Decoder(source.model.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    paths, tree = jax.tree_util.tree_flatten_with_path(described)
    arrays = arrays_of(source)
    model = jax.tree.unflatten(tree, [arrays[path_name(path)] for path, _ in paths])
    positions = np.tile(np.arange(31, dtype=np.int32), (2, 1))
    got = model.logits(model(tokens, Context(positions, np.ones_like(positions))).hidden)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    (tmp_path / "out").mkdir()
    huggingface.write(tmp_path / "out", source.model, arrays.__getitem__, around=source)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, before), (_, after) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(before, after), name
