"""Multi-token prediction: against transformers' module for drafting, and in the training loss against a sum written out."""

import json

import jax
import numpy as np
import pytest

from maxtrain.checkpoint import huggingface, weights
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.decoder import Decoder
from maxtrain.ops.attention import Context
from maxtrain.parallel.sharding import initialise, path_name
from maxtrain.training.step import next_token_loss

LENGTH = 40
CONFIG = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_mtp_layers": 2,
}
GLM = {name: value for name, value in CONFIG.items() if "_lora_" not in name and "qk_" not in name and name != "v_head_dim"}
CONFIGS = {
    "deepseek_v3": CONFIG,
    "glm4_moe": GLM
    | {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1},
}


def published(folder, family="deepseek_v3"):
    """transformers' model and module with random weights, and a folder with both in the published form."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **CONFIGS[family])
    main = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ahead = MtpModel(main, 2).eval()
    ahead.set_attn_implementation("eager")
    for parameter in {*main.parameters(), *ahead.parameters()}:
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    main.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in ahead.state_dict().items():
        if name.startswith("layers."):
            _, depth, rest = name.split(".", 2)
            rest = {"post_norm.weight": "shared_head.norm.weight"}.get(rest, rest.removeprefix("mtp_block."))
            tensors[f"model.layers.{2 + int(depth)}.{rest}"] = value.contiguous()
    for depth in (2, 3):
        tensors[f"model.layers.{depth}.embed_tokens.weight"] = main.model.embed_tokens.weight.clone()
        tensors[f"model.layers.{depth}.shared_head.head.weight"] = main.lm_head.weight.clone()
    save_file(tensors, folder / "model.safetensors")
    return main, ahead


def build(source):
    described = Decoder(source.model.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    paths, tree = jax.tree_util.tree_flatten_with_path(described)
    names = [path_name(path) for path, _ in paths]
    arrays = weights.load(source, dict(zip(names, [leaf for _, leaf in paths], strict=True)))
    return jax.tree.unflatten(tree, [arrays[name] for name in names]), arrays


def positions(tokens):
    return np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))


def their_logits(main, ahead, tokens):
    """Logits of each module, position by position: [2, batch, LENGTH], the last `depth + 1` positions missing."""
    import torch

    found = []
    with torch.no_grad():
        ids = torch.tensor(tokens)
        hidden = main.model(ids).last_hidden_state
        for depth in range(2):
            hidden, ids = hidden[:, :-1], ids[:, 1:]
            place = torch.arange(ids.shape[1])[None]
            hidden = ahead.forward_layer(depth, hidden, place, None, input_ids=ids)
            found.append(main.lm_head(hidden).numpy())
    return found


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_modules_are_those_of_transformers(family, tmp_path):
    """Logits within 1e-4 of its drafting module's; written again in the published form, it loads them and gives the same."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    (tmp_path / "theirs").mkdir()
    main, ahead = published(tmp_path / "theirs", family)
    source = huggingface.Folder(tmp_path / "theirs")
    assert source.model.mtp == schema.Mtp(num_layers=2)
    model, arrays = build(source)
    tokens = np.random.default_rng(0).integers(0, 96, (2, LENGTH)).astype(np.int32)
    want = their_logits(main, ahead, tokens)
    context = Context(positions(tokens), np.ones(tokens.shape, np.int32))
    hidden = model(tokens, context).hidden
    for depth in range(2):
        hidden = model.ahead(depth, np.roll(tokens, -1 - depth, axis=1), hidden, context).hidden
        assert error(np.asarray(model.logits(hidden))[:, : -1 - depth], want[depth]) < 1e-4

    (tmp_path / "ours").mkdir()
    config = huggingface.write(tmp_path / "ours", source.model, arrays.__getitem__)
    assert config["model_type"] == family
    assert config["num_nextn_predict_layers"] == 2
    again = huggingface.Folder(tmp_path / "ours")
    assert {name for name in again.shapes if "shared_head.head" in name or "layers.2.embed_tokens" in name}  # the copies are published
    for key, array in build(again)[1].items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype="float32")
    exported._keys_to_ignore_on_load_unexpected = [r"model\.layers\.(2|3)\."]
    module = MtpModel.from_pretrained(exported)
    module.set_attn_implementation("eager")
    for got, expected in zip(their_logits(exported, module, tokens), want, strict=True):
        assert error(got, expected) < 1e-5


@pytest.mark.slow
def test_folder_without_the_modules_is_the_model_alone(tmp_path):
    """transformers keeps the field and drops the weights."""
    published(tmp_path)[0].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert huggingface.Folder(tmp_path).model.mtp is None


@pytest.mark.slow
def test_half_of_the_modules_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    published(tmp_path)
    tensors = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "layers.3." not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    source = huggingface.Folder(tmp_path)
    with pytest.raises(Refused, match=r"model\.layers\.3\.enorm\.weight \[48\] is missing"):
        weights.check(source)


# ------------------------------------------------------------------------------------------------------- the loss

MODEL = schema.Model(
    vocab_size=259, embed=16, mlp=24, num_layers=1, num_heads=2, num_kv_heads=1, layers="unroll", mtp=schema.Mtp(num_layers=2)
)


@jax.jit
def further_log_probs(model, ids):
    """Of one document [1, length], what each module says: [length, vocab] each."""
    context = Context(positions(ids), np.ones(ids.shape, np.int32))
    hidden, found = model(ids, context).hidden, []
    for depth in range(2):
        hidden = model.ahead(depth, jax.numpy.roll(ids, -1 - depth, axis=1), hidden, context).hidden
        found.append(jax.nn.log_softmax(model.logits(hidden))[0])
    return found


def test_loss_is_the_mean_over_modules_within_documents():
    """Against a sum over positions that takes each document on its own; the last positions of one have no further tokens."""
    config = schema.Config(model=MODEL, precision=schema.Precision(compute="float32"))
    model = initialise(Decoder(MODEL, config.precision, schema.Remat()), 0)
    documents = [np.random.default_rng(n).integers(0, 259, n).astype(np.int32) for n in (9, 5, 2)]
    tokens = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3], [9, 5, 2])[None].astype(np.int32)
    place = np.concatenate([np.arange(len(d)) for d in documents])[None].astype(np.int32)
    last = np.append(segments[0, 1:] != segments[0, :-1], True)[None]
    targets = np.where(last, 0, np.roll(tokens, -1, axis=1))
    batch = {"tokens": tokens, "targets": targets, "positions": place, "segments": segments, "weights": (~last).astype(np.float32)}
    total, sums = jax.jit(next_token_loss(config))(model, batch)

    want = count = 0.0
    for document in documents:
        ids = document[None]
        for depth, log_probs in enumerate(further_log_probs(model, ids)):
            for position in range(len(document) - depth - 2):
                want -= log_probs[position, document[position + depth + 2]]
                count += 1
    assert sums["mtp_tokens"] == count == 7 + 3 + 0 + 6 + 2
    np.testing.assert_allclose(sums["mtp_loss"], want, rtol=1e-5)
    np.testing.assert_allclose(total, sums["loss"] + 0.3 / 2 * want, rtol=1e-5)


def test_loss_trains_the_modules_and_the_model():
    config = schema.Config(model=MODEL, precision=schema.Precision(compute="float32"))
    model = initialise(Decoder(MODEL, config.precision, schema.Remat()), 0)
    tokens = np.random.default_rng(0).integers(0, 259, (2, 12)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1), "positions": positions(tokens)}
    batch |= {"segments": np.ones(tokens.shape, np.int32), "weights": np.ones(tokens.shape, np.float32)}
    gradients = {}
    for weight in (0.0, 0.3):
        cfg = config.model_copy(update={"model": MODEL.model_copy(update={"mtp": schema.Mtp(num_layers=2, loss_weight=weight)})})
        grads = jax.jit(jax.grad(lambda model, cfg=cfg: next_token_loss(cfg)(model, batch)[0]))(model)
        gradients[weight] = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]}
    for name in gradients[0.3]:
        assert np.any(gradients[0.3][name] != gradients[0.0][name]), name
        assert np.any(gradients[0.0][name]) != name.startswith("mtp/"), name
