"""Config files of published models, and the copies that tools keep of them: read as the classes of transformers read them, or refused
with a setting that reads them. `configs.jsonl` has one a line, with the repository and path it is from."""

import json
import pathlib
import re

import numpy as np
import pytest
from meta import our_tensors, their_tensors

from maxtrain.config import Refused
from maxtrain.models import families
from maxtrain.models.families.family import function
from maxtrain.ops import rope

FILES = {file["name"]: file["config"] for file in map(json.loads, pathlib.Path(__file__).with_name("configs.jsonl").open())}
LIKE = {"kimi_k2": "deepseek_v3"}  # whose class is not in transformers
SETTING = re.compile(r"model\.ignore_fields=\[([\w.,]+)\]")


def read(config):
    """Family and section of a config, as the message of a refusal says if there is one, and what it said to ignore."""
    try:
        return *families.read(config), []
    except Refused as refusal:
        names = SETTING.search(str(refusal))[1].split(",")
        return *families.read(config, ignore=names), names


def test_each_is_read_or_says_how():
    ignored = {name: read(config)[2] for name, config in FILES.items()}
    assert len(ignored) == 128
    assert sum(map(bool, ignored.values())) == 27
    known = {"hidden_size", "num_hidden_layers", "rope_theta", "head_dim", "sliding_window", "layer_types", "attention_bias"}
    assert not known & {field for names in ignored.values() for field in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_equals_what_the_class_of_transformers_makes_of_it(name):
    """Every field of the section, names and shapes of all tensors, frequencies of all layers."""
    pytest.importorskip("torch")
    from transformers import AutoConfig

    family, model, ignored = read(FILES[name])
    raw = {key: value for key, value in FILES[name].items() if key not in ("model_type", "attn_implementation", *ignored)}
    theirs = AutoConfig.for_model(LIKE.get(family.model_type, family.model_type), **raw)
    normalised = json.loads(theirs.to_json_string(use_diff=False))
    assert function(families.read(normalised)[1]) == function(model)
    found, ahead = their_tensors(theirs, model)
    tensors = our_tensors(family, model, found | ahead)
    empty = {key for key, shape in found.items() if 0 in shape}  # experts that see all tokens, of width 0, and their gate
    gates = {key for key in found if empty and "shared_expert_gate" in key}
    assert tensors == {key: shape for key, shape in (found | ahead).items() if key not in empty | gates}
    for kind in dict.fromkeys(model.kinds):
        ours = model.slots[kind].rope or model.rope
        layer_type = "sliding_attention" if model.slots[kind].window else "full_attention"
        want = their_frequencies(theirs, layer_type)
        width = model.mla.rope_dim if model.mla else model.head_width
        np.testing.assert_allclose(rope.frequencies(ours, ours.width(width)), want, rtol=2e-6, err_msg=kind)


def their_frequencies(config, layer_type):
    """The frequencies of a layer by transformers' own functions, those of short documents."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = config.rope_parameters
    rotary, layer_type = (rotary[layer_type], layer_type) if layer_type in rotary else (rotary, None)
    if rotary["rope_type"] == "default":
        latent = getattr(config, "qk_rope_head_dim", None)
        head = latent or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = int(head * (1.0 if latent else rotary.get("partial_rotary_factor", 1.0)))
        return 1.0 / rotary["rope_theta"] ** (np.arange(0, width, 2) / width)
    more = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS[rotary["rope_type"]](config, "cpu", **more)[0].numpy()
