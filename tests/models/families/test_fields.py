"""A config.json is read completely or refused: unknown fields, unsupported values, both forms of rotary embeddings."""

import pytest

from maxtrain.config import Refused, schema
from maxtrain.models import families
from maxtrain.models.families.family import function

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def model(**fields):
    config = CONFIG | fields
    return families.of_config(config).model(config)


def test_both_forms_of_rope_are_one_model():
    before = model(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    oldest = model(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    today = model(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert before == oldest == today
    assert today.rope == schema.Rope(theta=5e5, scaling=schema.RopeScaling(kind="llama3", factor=8.0, original_length=32))
    assert model(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope == schema.Rope(theta=5e5)


def test_absent_fields_take_the_defaults_of_the_class():
    plain = model()
    assert (plain.norm_eps, plain.rope.theta, plain.tie_embeddings, plain.head_width) == (1e-6, 1e4, False, 8)
    assert model(num_key_value_heads=None).num_kv_heads == 6
    mistral = CONFIG | {"model_type": "mistral"}
    assert families.of_config(mistral).model(mistral).slots["layer"].window == 4096
    mistral["sliding_window"] = None
    assert families.of_config(mistral).model(mistral).slots["layer"].window is None


def test_fields_without_effect():
    ignored = {"torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2], "attention_dropout": 0.0, "pretraining_tp": 4}
    assert model(**ignored, attention_bias=False) == model()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_multiplier": 0.5}, ["attention_multiplier = 0.5", "unknown"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1", "only 0.0"]),
        ({"rope_interleaved": True}, ["rope_interleaved = True", "only False"]),
        ({"hidden_act": "gelu_tanh"}, ["hidden_act = 'gelu_tanh'", "silu"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "48"}, ["embed", "'48'"]),
        ({"num_attention_heads": 5}, ["num_heads=5"]),
        ({"rope_scaling": {"type": "wavelet", "factor": 2.0}}, ["wavelet", "llama3"]),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section", "unknown"]),
        ({"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": {"rope_type": "default"}}, ["differ"]),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, ["differ"]),
        ({"model_type": "lama"}, ["lama", "did you mean llama"]),
    ],
)
def test_refused_by_name(fields, words):
    with pytest.raises(Refused) as refusal:
        model(**fields)
    for word in ["config.json", *words]:
        assert word in str(refusal.value)


def test_config_is_chosen_by_function_not_by_name():
    windowed = schema.Model(vocab_size=97, slots={"near": schema.Slot(window=16)}, layer_pattern=("near",))
    family, config = families.of_model(windowed)
    assert (family.model_type, config["sliding_window"]) == ("mistral", 16)
    assert function(family.model(config)) == function(windowed)
    assert families.of_model(schema.Model())[0].model_type == "llama"
    assert families.of_model(schema.Model(), "mistral")[1]["sliding_window"] is None


def test_model_that_no_family_describes():
    slots = {"near": schema.Slot(window=16), "far": schema.Slot(rope=schema.Rope(theta=7.0))}
    odd = schema.Model(slots=slots, layer_pattern=("near", "far"))
    with pytest.raises(Refused, match="no family") as refusal:
        families.of_model(odd, "mixtral")
    assert "moe = None" in str(refusal.value)
    with pytest.raises(Refused, match="did you mean mixtral"):
        families.of_model(odd, "mixtrall")
