"""Single mechanisms that families are known by, each shown to act; and that a preset's name does not."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from maxtrain.config import load, schema
from maxtrain.models.decoder import Decoder
from maxtrain.ops.attention import Context
from maxtrain.parallel.sharding import initialise, path_name

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"
TOKENS = np.random.default_rng(0).integers(0, 259, (2, 40)).astype(np.int32)
CONTEXT = Context(np.tile(np.arange(40, dtype=np.int32), (2, 1)), np.ones((2, 40), np.int32))


def build(cfg):
    cfg = cfg.model_copy(update={"layers": "unroll"})
    return initialise(Decoder(cfg, schema.Precision(compute="float32"), schema.Remat()), 0)


@jax.jit
def logits(model):
    return model.logits(model(TOKENS, CONTEXT).hidden)


def changed(model, ending, change):
    """The model with other values for the parameters whose names end so."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    return jax.tree.unflatten(tree, [change(leaf) if path_name(path).endswith(ending) else leaf for path, leaf in leaves])


@pytest.mark.parametrize("name", ["gemma3-1b", "gemma3-4b", "gemma3-12b", "gemma3-27b"])
def test_gemma_3_turns_local_and_global_layers_by_two_thetas(name):
    model = load(FOLDER / f"{name}.yml").config.model
    found = {(model.slots[kind].window is not None, (model.slots[kind].rope or model.rope).theta) for kind in model.kinds}
    assert found == {(True, 10_000.0), (False, 1_000_000.0)}
    stretched = {model.slots[kind].window is None for kind in model.kinds if (model.slots[kind].rope or model.rope).scaling}
    assert stretched == ({True} if name != "gemma3-1b" else set())


def test_gemma_3_with_one_theta_is_another_model():
    cfg = load(FOLDER / "gemma3-tiny.yml").config.model
    alike = cfg.model_copy(update={"slots": {name: slot.model_copy(update={"rope": None}) for name, slot in cfg.slots.items()}})
    two, one = build(cfg), build(alike)
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(logits(two) - logits(one)).max() > 1e-3


def test_sinks_of_gpt_oss_take_part_and_vanish_at_minus_infinity():
    cfg = load(FOLDER / "gpt-oss-tiny.yml").config.model
    model, without = build(cfg), build(cfg.model_copy(update={"attention_sinks": False}))
    named = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    paths, tree = jax.tree_util.tree_flatten_with_path(without)
    without = jax.tree.unflatten(tree, [named[path_name(path)] for path, _ in paths])
    np.testing.assert_allclose(logits(changed(model, "sinks", lambda x: x - 1e9)), logits(without), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(model) - logits(without)).max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2-tiny", "deepseek-v3-tiny"])
def test_a_renamed_preset_is_bit_identical(name, tmp_path):
    shutil.copy(FOLDER / f"{name}.yml", tmp_path / "something-else.yml")
    ours, other = (build(load(path).config.model) for path in (FOLDER / f"{name}.yml", tmp_path / "something-else.yml"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(logits(ours), logits(other))
