"""The gradient of a parameter is a sum over tokens, and no such sum is taken below float32, on one device or several."""

import json
import sys
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from programs import build

from maxtrain.checkpoint import huggingface
from maxtrain.config import load
from maxtrain.models import moe
from maxtrain.ops import grouped_matmul, routing
from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import path_name
from maxtrain.training.step import make_train_step

TOKENS = 53  # no other size is a multiple of it, so an array without tokens is one whose size is not
ADDITIONS = {"add", "sub", "add_any", "reduce_sum", "cumsum", "cumlogsumexp", "reduce_window_sum", "dot_general", "ragged_dot_general"}
ADDITIONS |= {"conv_general_dilated", "scatter-add", "psum", "psum_invariant", "reduce_scatter"}
FAMILIES = {
    "biases": ("qwen2.5-tiny", ["model.out_bias=true", "model.mlp_bias=true"]),
    "tied": ("smollm3-tiny", ["model.tie_embeddings=true"]),
    "shared expert": ("deepseek-v3-tiny", []),  # with latent attention, balancing bias and multi-token prediction
    "router and expert biases": ("gpt-oss-tiny", []),  # with sinks
    "softcaps": ("gemma2-tiny", []),
    "capacity": ("mixtral-tiny", ["model.moe.dispatch=capacity", "model.moe.capacity_factor=1.0"]),
    "layer norm": ("command-r-tiny", []),
}
SHORT = {"biases", "capacity"}
LAYOUTS = {
    "remat": ["remat.policy=full", "model.layers=scan", "train.microbatches=2"],
    "data and tensor": ["mesh.fsdp=2", "mesh.data=2", "mesh.tensor=2"],
    "experts": ["mesh.fsdp=2", "mesh.expert=2"],
    "ring": ["mesh.fsdp=2", "mesh.context=2"],
    "stages": ["mesh.fsdp=2", "mesh.stage=2", "model.num_layers=4", "remat.policy=dots"],
}


def inner(eqn):
    """The jaxprs within an operation, whatever it calls them; not how a scatter combines two numbers."""
    params = {name: value for name, value in eqn.params.items() if name != "update_jaxpr"}
    for value in jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))):
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value


def walk(jaxpr):
    """All operations of a jaxpr and of those within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in inner(eqn):
            yield from walk(sub)


def rough_sums(jaxpr, tokens=TOKENS):
    """Additions below float32 whose result has lost the tokens: what becomes a parameter's gradient, or is put into one."""
    found = []
    for eqn in walk(jaxpr):
        for out in eqn.outvars:
            low = jnp.issubdtype(out.aval.dtype, jnp.floating) and jnp.finfo(out.aval.dtype).bits < 32
            if eqn.primitive.name in ADDITIONS and low and out.aval.size % tokens:
                found.append(f"{eqn.primitive.name} {out.aval.str_short()}")
    return sorted(set(found))


def traced(preset, *overrides):
    """The jaxpr of a step in bfloat16, whose blocks of an expert's rows hold whole multiples of TOKENS too."""
    given = ["precision.compute=bfloat16", "data.batch_size=8", f"data.length={2 * TOKENS}", f"train.loss_chunk={TOKENS}"]
    given += [] if any("mesh.fsdp" in word for word in overrides) else ["mesh.fsdp=1"]
    program = build(load(f"configs/models/{preset}.yml", [*given, *overrides]).config)
    with mock.patch.object(grouped_matmul, "BLOCK", TOKENS), sharding.use(program.layout):
        return jax.make_jaxpr(make_train_step(program.config, program.loss_fn))(
            program.state, program.batch(8, 2 * TOKENS), program.stop
        ).jaxpr


@pytest.mark.parametrize("family", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_sums_over_tokens_are_float32(family):
    preset, overrides = FAMILIES[family]
    assert rough_sums(traced(preset, *overrides)) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["biases", "router and expert biases", "capacity"])
def test_sums_over_devices_and_microbatches_are_float32(family, layout):
    preset, overrides = FAMILIES[family]
    assert rough_sums(traced(preset, *overrides, *LAYOUTS[layout])) == []


@pytest.mark.slow
def test_kernels_of_accelerators_sum_in_float32(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "KERNELS", {})
    assert rough_sums(traced("gpt-oss-tiny")) == []


def _rough(kind):
    """A function of bfloat16 tokens [TOKENS, 4] that sums them in one of the ways a backward pass can."""
    ways = {
        "sum": lambda x: jax.lax.reduce(x, jnp.bfloat16(0), jax.lax.add, (0,)),
        "scatter": lambda x: jnp.zeros((8, 4), x.dtype).at[jnp.arange(TOKENS) % 8].add(x),
        "carry": lambda x: jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros(4, x.dtype), x)[0],
        "product": lambda x: x.T @ x,
        "branch": lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x.T @ x, lambda x: jnp.zeros((4, 4), x.dtype), x),
        "remat": jax.grad(lambda w: jax.checkpoint(lambda w: jnp.ones((TOKENS, 4), w.dtype) * w)(w).astype(jnp.float32).sum()),
        "devices": jax.shard_map(
            lambda x: jax.lax.psum(x[0], "d"),
            mesh=jax.sharding.Mesh(jax.devices()[:1], "d"),
            in_specs=jax.P("d"),
            out_specs=jax.P(),
            check_vma=False,
        ),
    }
    return jax.make_jaxpr(ways[kind])(jnp.ones((4,) if kind == "remat" else (TOKENS, 4), jnp.bfloat16)).jaxpr


@pytest.mark.parametrize("kind", ["sum", "scatter", "carry", "product", "branch", "remat", "devices"])
def test_a_rough_sum_is_found(kind):
    assert rough_sums(_rough(kind))


ROWS, LENGTH, PARTS = 128, 128, 8
UNBALANCED = ["model.moe.aux_loss=0.0", "model.moe.router_z_loss=0.0"]  # terms that no weight takes out
MEASURED = {name: FAMILIES[name] for name in ("biases", "tied", "softcaps")}
MEASURED |= {name: (FAMILIES[name][0], UNBALANCED) for name in ("shared expert", "router and expert biases")}
MEASURED["shared expert behind a gate"] = ("qwen2-moe-tiny", UNBALANCED)
NEAR = {"biases", "softcaps"}  # families whose bfloat16 gradients are within 2% of float32's
AS_PYTORCH = {  # the others, with what transformers calls them: PyTorch's own bfloat16 is as far from its float32
    "tied": "smollm3",
    "shared expert": "deepseek_v3",
    "router and expert biases": "gpt_oss",
    "shared expert behind a gate": "qwen2_moe",
}


def frequent_batch(vocab):
    """16,384 tokens, 6% of them one and the same."""
    rng = np.random.default_rng(0)
    tokens = (rng.random((ROWS, LENGTH + 1)) ** 3 * (vocab - 8)).astype(np.int32) + 7
    tokens[rng.random(tokens.shape) < 0.06] = 5
    ones, at = np.ones((ROWS, LENGTH), np.int32), np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": at, "segments": ones}
    return batch | {"weights": ones.astype(np.float32), "source": np.zeros(ROWS, np.int32)}


def gradients(preset, compute, *overrides):
    """A function of the sequences that count, bool [ROWS]: gradients by name, float64, of a program that is the same for all choices."""
    given = [f"precision.compute={compute}", f"data.batch_size={ROWS}", f"data.length={LENGTH}", "mesh.fsdp=1"]
    program = build(load(f"configs/models/{preset}.yml", [*given, *overrides]).config)
    model, batch = program.create(0).model, frequent_batch(program.config.model.vocab_size)
    gradient = jax.jit(jax.grad(lambda model, batch: program.loss_fn(model, batch)[0]))

    def of(counted):
        with sharding.use(program.layout):
            found = jax.device_get(gradient(model, batch | {"weights": batch["weights"] * counted[:, None].astype(np.float32)}))
        named = {path_name(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]}
        return {name: leaf for name, leaf in named.items() if "balance" not in name}  # a count of tokens, whatever counts

    return of


def by_position(cfg, logits, bias):
    """`route` to experts by position: between two of nearly equal scores, rounding alone would choose."""
    return routing.route(cfg, logits, jnp.asarray(10 * np.random.default_rng(1).random((1, *logits.shape[1:])), jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("family", MEASURED)
def test_gradients_in_bfloat16(family, monkeypatch):
    """Relative L2 against the same forward pass summed in float64, an eighth of the sequences at a time, and against float32."""
    monkeypatch.setattr(moe, "route", by_position)
    preset, overrides = MEASURED[family]
    everything, of = np.ones(ROWS), gradients(preset, "bfloat16", *overrides)
    whole, parts = of(everything), [of((np.arange(ROWS) % PARTS == part).astype(np.float64)) for part in range(PARTS)]
    exact = gradients(preset, "float32", *overrides)(everything)
    for name, found in whole.items():
        summed = sum(part[name] for part in parts)
        assert np.linalg.norm(found - summed) <= 0.005 * np.linalg.norm(summed), name
        assert family not in NEAR or np.linalg.norm(found - exact[name]) <= 0.02 * np.linalg.norm(exact[name]), name


def largest_error(found, exact):
    """The largest relative L2 of any parameter's gradient."""
    return max(np.linalg.norm(found[name] - value) / np.linalg.norm(value) for name, value in exact.items())


def pytorch_gradients(folder, batch, dtype):
    """Gradients by name, float64, of the model in a folder, computed by transformers in a precision."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(dtype)
    tokens, targets = (torch.tensor(batch[name]).long() for name in ("tokens", "targets"))
    torch.nn.functional.cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return {name: weight.grad.double().numpy() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("family", AS_PYTORCH)
def test_bfloat16_costs_what_it_costs_pytorch(family, tmp_path, monkeypatch):
    """Where gradients in bfloat16 are more than 2% from float32's, so are those of transformers, with the same weights and tokens."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys.modules[__name__], "ROWS", 16)
    preset, overrides = MEASURED[family]
    program = build(load(f"configs/models/{preset}.yml", ["model.layers=unroll", "mesh.fsdp=1", *overrides]).config)
    leaves = jax.tree_util.tree_flatten_with_path(program.create(0).model)[0]
    arrays = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    huggingface.write(tmp_path, program.config.model, arrays.__getitem__, family=AS_PYTORCH[family])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # those of the tokenizer, beyond a small vocabulary
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch = frequent_batch(program.config.model.vocab_size)
    theirs = largest_error(*(pytorch_gradients(tmp_path, batch, dtype) for dtype in (torch.bfloat16, torch.float32)))
    ours = largest_error(*(gradients(preset, compute, *overrides)(np.ones(ROWS)) for compute in ("bfloat16", "float32")))
    assert theirs > 0.02
    assert ours < 1.3 * theirs
