"""The long tier: logits, loss and gradients against PyTorch transformers with the same weights."""

import jax
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.models.decoder import Decoder
from maxtrain.ops.attention import Context
from maxtrain.ops.loss import cross_entropy
from maxtrain.parallel.sharding import path_name

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 97}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OURS = {"embed": 48, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3, "vocab_size": 97, "norm_eps": 1e-5}


def llama(tied, scaled):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = SCALED | {"original_max_position_embeddings": 32} if scaled else {"rope_type": "default", "rope_theta": 1e4}
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=80, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope))
    scaling = schema.RopeScaling(factor=8.0, original_length=32) if scaled else None
    ours = schema.Model(**OURS, mlp=80, tie_embeddings=tied, rope=schema.Rope(theta=rope["rope_theta"], scaling=scaling))
    return ours, theirs


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = MixtralConfig(
        **SIZES, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_parameters=rope
    )
    config.tie_word_embeddings = False
    moe = schema.Moe(num_experts=4, experts_per_token=2, mlp=40, aux_loss=0.0)
    slots = {"layer": schema.Slot(feed_forward="moe")}
    return schema.Model(**OURS, tie_embeddings=False, rope=schema.Rope(theta=1e6), slots=slots, moe=moe), MixtralForCausalLM(config)


CASES = {
    "llama tied": lambda: llama(True, False),
    "llama untied": lambda: llama(False, False),
    "llama 3.1 rope": lambda: llama(False, True),
    "mixtral": mixtral,
}


def their_array(name, tensors, cfg):
    """The reference's tensor for one of our parameter names, in our layout; `tensors` may hold weights or gradients."""
    top = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "norm/scale": "model.norm.weight"}
    if name in top:
        return tensors[top[name]]
    _, layer, _, _, *rest = name.split("/")
    prefix, part = f"model.layers.{layer}.", "/".join(rest)
    norms = {"attention_norm/scale": "input_layernorm.weight", "feed_forward_norm/scale": "post_attention_layernorm.weight"}
    if part in norms:
        return tensors[prefix + norms[part]]
    if part.startswith("attention/"):
        return tensors[f"{prefix}self_attn.{part[-1] if part[-1] in 'qkv' else 'o'}_proj.weight"].T
    key = part.split("/")[1]
    if cfg.moe is None:
        return tensors[f"{prefix}mlp.{key}_proj.weight"].T
    if key == "router":
        return tensors[f"{prefix}mlp.gate.weight"].T
    if key == "down":
        return tensors[f"{prefix}mlp.experts.down_proj"].transpose(0, 2, 1)
    gate, up = np.split(tensors[f"{prefix}mlp.experts.gate_up_proj"], 2, axis=1)
    return (gate if key == "gate" else up).transpose(0, 2, 1)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    cfg, theirs = CASES[case]()
    cfg = cfg.model_copy(update={"layers": "unroll"})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 71))
    output = theirs(torch.tensor(tokens))
    logits = output.logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten(), reduction="sum")
    loss.backward()

    model = Decoder(cfg, schema.Precision(compute="float32"), schema.Remat())
    paths, tree = jax.tree_util.tree_flatten_with_path(model)
    names = [path_name(path) for path, _ in paths]
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    model = jax.tree.unflatten(tree, [np.ascontiguousarray(their_array(name, weights, cfg)) for name in names])
    context = Context(np.tile(np.arange(71, dtype=np.int32), (2, 1)), np.ones((2, 71), np.int32))

    def loss_fn(model):
        hidden = model(tokens.astype(np.int32), context).hidden
        weight = np.ones((2, 71), np.float32)
        weight[:, -1] = 0
        targets = np.roll(tokens, -1, axis=1).astype(np.int32)
        return cross_entropy(hidden, model.head_weights, targets, weight, z_loss=0.0, chunk=16)[0], model.logits(hidden)

    (ours, our_logits), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model)
    want = logits.detach().numpy()
    assert np.abs(our_logits - want).max() / np.abs(want).max() < 1e-4
    assert abs(float(ours) - loss.item()) / loss.item() < 1e-5
    grads = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters()}
    for name, got in zip(names, jax.tree.leaves(gradients), strict=True):
        want = their_array(name, grads, cfg)
        assert np.abs(got - want).max() / np.abs(want).max() < 1e-3, name
