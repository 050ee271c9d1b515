"""Every family against transformers: import, function, gradients, export, re-import; every preset against its published config.

A family joins by a file in `cases/` with `CASES[model_type][name]`, arguments of its config class, and `PRESETS[preset]`, the
published config.json and number of parameters.
"""

import copy
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meta import our_tensors, their_tensors

from maxtrain.checkpoint import huggingface, weights
from maxtrain.config import Refused, load, schema
from maxtrain.models import families
from maxtrain.models.decoder import Decoder
from maxtrain.models.families.family import function
from maxtrain.models.layers import NORMS
from maxtrain.ops.attention import Context
from maxtrain.ops.loss import cross_entropy
from maxtrain.parallel.sharding import path_name

pytestmark = pytest.mark.slow
LENGTH = 71  # beyond the window and the original length of the cases
FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"


def modules():
    for path in sorted((pathlib.Path(__file__).parent / "cases").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"cases_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


MODULES = list(modules())
CASES = {family: cases for module in MODULES for family, cases in module.CASES.items()}
PRESETS = {name: facts for module in MODULES for name, facts in getattr(module, "PRESETS", {}).items()}
LIKE = {name: other for module in MODULES for name, other in getattr(module, "LIKE", {}).items()}
# Of the largest logit, where PyTorch's float32 is more than a quarter of it from its float64 with the same weights: tested beside
LIMITS = {
    ("gemma", "plain"): 4e-5,
    ("gemma", "one kv head"): 4e-5,
    ("gemma3_text", "scaled"): 6e-5,
    ("gpt_oss", "as published"): 3e-5,
    ("gpt_oss", "whole pairs"): 2.5e-5,
}
EVERY = [(family, name) for family, cases in CASES.items() for name in cases]


def reference(family, name):
    """The reference with random weights large enough that every mechanism shows in the logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(LIKE.get(family, family), **CASES[family][name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for key, buffer in model.named_buffers():
        if key.endswith("bias"):  # a routing bias is no parameter there
            torch.nn.init.uniform_(buffer, -0.1, 0.1)
    return model


def case_config(family, name):
    """The config.json of a case."""
    from transformers import AutoConfig

    return AutoConfig.for_model(LIKE.get(family, family), **CASES[family][name]).to_dict() | {"model_type": family}


def save(family, name, folder):
    """The reference, and its folder under the family's own name."""
    model = reference(family, name)
    model.save_pretrained(folder)
    rename(folder, family)
    return model


def rename(folder, model_type):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))


def build(cfg, source):
    """Our model with the arrays of a folder, and the names of its leaves."""
    described = Decoder(cfg.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    paths, tree = jax.tree_util.tree_flatten_with_path(described)
    names = [path_name(path) for path, _ in paths]
    arrays = weights.load(source, dict(zip(names, [leaf for _, leaf in paths], strict=True)))
    return jax.tree.unflatten(tree, [arrays[name] for name in names]), arrays


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def context(tokens):
    return Context(np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)), np.ones(tokens.shape, np.int32))


@pytest.mark.parametrize("family", CASES)
def test_the_norm_rounds_as_the_reference_does(family):
    """In bfloat16, where the scale is multiplied before or after the rounding: between the two, one number in four differs."""
    torch = pytest.importorskip("torch")
    name = next(iter(CASES[family]))
    theirs = reference(family, name).model
    assert {type(part) for key, part in theirs.named_modules() if key.endswith("norm")} == {type(theirs.norm)}
    norm = theirs.norm.to(torch.bfloat16)
    _, model = families.read(case_config(family, name))
    x = torch.randn(200, model.embed).to(torch.bfloat16)
    scale, given = (jnp.asarray(value.detach().float().numpy()).astype(jnp.bfloat16) for value in (norm.weight, x))
    got, want = np.asarray(NORMS[model.norm][0](given, scale, model.norm_eps), np.float32), norm(x).detach().float().numpy()
    assert np.mean(got != want) < 0.01


@pytest.mark.as_users
@pytest.mark.parametrize(("family", "name"), EVERY)
def test_import_export_and_logits(family, name, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = save(family, name, tmp_path / "theirs")
    source = huggingface.Folder(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, source.model.vocab_size - 1, (2, LENGTH)).astype(np.int32)
    model, arrays = build(source.model, source)
    ours = jax.jit(lambda model: model.logits(model(tokens, context(tokens)).hidden))(model)
    want = their_logits(theirs, tokens)
    limit = LIMITS.get((family, name), 1e-5)
    assert error(ours, want) < limit
    if limit > 1e-5:  # float32 itself is as far from float64 there
        double = copy.deepcopy(theirs).double()
        double.set_experts_implementation("eager")  # the grouped products know no float64
        assert error(want, their_logits(double, tokens)) > limit / 4

    (tmp_path / "ours").mkdir()
    config = huggingface.write(tmp_path / "ours", source.model, arrays.__getitem__, family=family, shard_bytes=30_000)
    assert config["model_type"] == family
    again = huggingface.Folder(tmp_path / "ours")
    assert function(again.model) == function(source.model)
    _, back = build(again.model, again)
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    rename(tmp_path / "ours", LIKE.get(family, family))
    exported, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True, dtype="float32", pad_token_id=theirs.config.pad_token_id
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert error(their_logits(exported, tokens), want) < 1e-5


@pytest.mark.parametrize("family", CASES)
def test_gradients(family, tmp_path):
    """The loss and its gradient for the last of the family's cases."""
    import torch

    theirs = save(family, list(CASES[family])[-1], tmp_path)
    source = huggingface.Folder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, source.model.vocab_size - 1, (2, LENGTH)).astype(np.int32)
    logits = theirs(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).long().flatten(), reduction="sum")
    loss.backward()
    model, _ = build(source.model, source)

    def loss_fn(model):
        weight = np.ones(tokens.shape, np.float32)
        weight[:, -1] = 0
        hidden = model(tokens, context(tokens)).hidden
        return cross_entropy(
            hidden, model.head_weights, np.roll(tokens, -1, axis=1), weight, z_loss=0.0, chunk=16, softcap=source.model.final_softcap
        )[0]

    ours, gradients = jax.jit(jax.value_and_grad(loss_fn))(model)
    assert abs(float(ours) - loss.item()) / loss.item() < 1e-5
    got = named(gradients)
    grads = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for row in source.family.rows(source.model):
        form = families.choose(row, grads)
        if row.ours[0].endswith("balance_bias"):  # no gradient trains it, there it is a buffer
            assert not set(form.names) & set(grads)
            continue
        for key, want in zip(row.ours, form.transform.load([grads[name] for name in form.names]), strict=True):
            assert error(got[key], want) < 1e-3, key


def named(model):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_the_published_model(preset):
    """The published config, and what transformers makes of it, is the preset; tensors on torch's meta device are those of our table."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    config, count = PRESETS[preset]
    family = families.of_config(config)
    model = family.model(config)
    ours = load(FOLDER / f"{preset}.yml").config.model
    assert function(ours) == function(model)
    assert families.of_model(ours)[1]["model_type"] in families.FAMILIES
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    theirs = AutoConfig.for_model(LIKE.get(config["model_type"], config["model_type"]), **arguments)
    normalised = json.loads(theirs.to_json_string(use_diff=False))
    assert function(families.of_config(normalised).model(normalised)) == function(model)
    found, ahead = their_tensors(theirs, model)
    assert sum(int(np.prod(shape, dtype=np.int64)) for shape in found.values()) == count
    assert our_tensors(family, ours, found | ahead) == found | ahead


# Classes whose defaults are no model, and what makes them one
COMPLETION = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}
# Presets that are the defaults of a class; in most a length, base or epsilon is not the published one
DEFAULTS = {"gemma": "gemma-7b", "gemma2": "gemma2-2b", "gpt_oss": "gpt-oss-120b"}


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in LIKE])
def test_absent_fields_take_the_defaults_of_the_class(name):
    """All fields of a class's defaults, and only those that must be there, are one model, with the tensors of transformers."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    family, some = families.FAMILIES[name], COMPLETION.get(name, {})
    config = AutoConfig.for_model(name, **some)
    whole = json.loads(config.to_json_string(use_diff=False))
    model = family.model(completed(family, {"model_type": name, **some}, whole))
    assert function(model) == function(family.model(whole))
    found, ahead = their_tensors(config, model)
    assert our_tensors(family, model, found | ahead) == found | ahead
    assert name not in DEFAULTS or function(model) == function(load(FOLDER / f"{DEFAULTS[name]}.yml").config.model)
    if model.mla is None:  # no default is one by chance: a model twice as wide
        some = some | {field: 2 * whole[field] for field in ("hidden_size", "num_attention_heads")}
        whole = json.loads(AutoConfig.for_model(name, **some).to_json_string(use_diff=False))
        part = completed(family, {"model_type": name, **some}, whole)
        assert function(family.model(part)) == function(family.model(whole))


def completed(family, part, whole):
    """The fields of `part`, and those of `whole` that the family will not do without."""
    while True:
        try:
            family.model(part)
        except Refused as refusal:
            missing = str(refusal).split("the field ")[1].split(" is missing")[0]
            part = part | {missing: whole[missing]}
        else:
            return part


def test_every_preset_has_its_published_config():
    assert {path.stem for path in FOLDER.glob("*.yml") if not path.stem.endswith("-tiny")} == set(PRESETS)
