"""A config.json is read completely or refused: unknown fields, unsupported values, both forms of rotary embeddings."""

import contextlib
import random
import re

import pytest

from maxtrain.config import Refused, load, schema
from maxtrain.models import families
from maxtrain.models.families import pattern
from maxtrain.models.families.family import function
from maxtrain.models.families.harmless import NEVER_MATTERS

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
    generation = {"do_sample": True, "temperature": 0.6, "top_p": "any", "max_length": 20, "num_beams": 4, "bad_words_ids": [[3]]}
    old = {"torchscript": False, "use_bfloat16": True, "pruned_heads": {}, "tie_encoder_decoder": False, "max_sequence_length": 2048}
    assert model(**ignored, **generation, **old, attention_bias=False) == model()


@pytest.mark.slow
def test_generation_fields_are_those_of_transformers():
    generation = pytest.importorskip("transformers").GenerationConfig
    ids = {"assistant_ensemble_weight", "speculation_type"}  # newer than any file that has them in config.json
    assert set(generation._get_default_generation_params()) - ids <= NEVER_MATTERS


def test_a_second_name_is_read_where_it_says_what_the_first_does():
    mistral = CONFIG | {"model_type": "mistral"}  # its class has a window of 4096 where none is written
    assert families.read(mistral | {"sliding_window_size": 4096}) == families.read(mistral)
    for one, other in ((None, 1024), (1024, 4096)):
        with pytest.raises(Refused, match=f"sliding_window_size = {other}: this field is unknown"):
            families.read(mistral | ({} if one is None else {"sliding_window": one}) | {"sliding_window_size": other})


def test_dropout_is_told_and_not_refused(caplog):
    assert model(attention_dropout=0.1, resid_pdrop=0) == model()
    assert ["attention_dropout = 0.1" in record.message for record in caplog.records] == [True]


def test_following_the_refusal_reads_the_file():
    scaled = {"rope_type": "linear", "factor": 2.0, "odd": 1}
    config = CONFIG | {"made_by": "x", "a b,c": 2, "rope_scaling": scaled, "rope_parameters": 1.0}
    with pytest.raises(Refused) as refusal:
        families.read(config)
    setting = re.search(r"model\.ignore_fields=.*", str(refusal.value))[0]
    names = load(None, [setting, "model.init_from=x"]).config.model.ignore_fields
    assert names == ("rope_parameters", "made_by", "a b,c", "rope_scaling.odd")
    assert families.read(config, ignore=names)[1] == model(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(Refused, match=r"no field maid_by.*did you mean made_by"):
        families.read(config, ignore=["maid_by"])
    with pytest.raises(Refused, match=r"model.ignore_fields=\[made_by,rope_scaling\]"):  # those that were ignored before stay
        families.read(CONFIG | {"made_by": 1, "rope_scaling": 2}, ignore=["made_by"])


def test_many_unknown_fields_make_a_short_message():
    with pytest.raises(Refused) as refusal:
        model(**{f"x{index}": index for index in range(100_000)})
    assert "and 99,980 more" in str(refusal.value)
    assert len(str(refusal.value)) < 3000


def test_null_where_it_is_a_value():
    qwen = CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    assert families.read(qwen)[1].slots["sliding_attention"].window == 4096
    assert families.read(qwen | {"sliding_window": None})[1].slots["full_attention"].window is None


def test_activation_of_the_first_gemma():
    gemma = CONFIG | {"model_type": "gemma", "head_dim": 8}
    assert families.read(gemma | {"hidden_act": "gelu"})[1] == families.read(gemma)[1]
    assert families.read(gemma)[1].activation == "gelu_tanh"
    assert families.read(CONFIG | {"hidden_act": "gelu"})[1].activation == "gelu"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_values_of_another_type(family):
    """Every field of a family's config, each with values that it cannot have: never another error than a refusal."""
    whole = families.FAMILIES[family].write(schema.Model(vocab_size=97))
    whole = CONFIG | whole | {"model_type": family, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    for name in whole:
        for value in ("x", [], [[]], {}, {"a": {}}, True, -1, 0, 1e308, 10**400, 0.5, [None], 10**6):
            with contextlib.suppress(Refused):
                families.read(whole | {name: value})


def test_layers_that_repeat():
    """The shortest prefix and period, against trying all."""
    draws = random.Random(0)
    slots = {"a": schema.Slot(), "b": schema.Slot(window=2)}
    for _ in range(300):
        kinds = [draws.choice("ab") for _ in range(draws.randint(1, 12))]
        found = pattern.grouped(kinds, slots)
        prefix, period = len(found["prefix"]), len(found["layer_pattern"])
        shapes = [(total - size, size) for total in range(1, len(kinds) + 1) for size in range(1, total + 1)]
        fits = (all(kinds[i] == kinds[p + (i - p) % size] for i in range(p, len(kinds))) for p, size in shapes)
        assert (prefix, period) == next(shape for shape, fit in zip(shapes, fits, strict=True) if fit)
    pattern.grouped(["a", "b"] * 5000 + ["b"], slots)  # at once


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_multiplier": 0.5}, ["attention_multiplier = 0.5", "unknown"]),
        ({"pruned_heads": {"0": [1]}}, ["pruned_heads = {'0': [1]}", "only {}"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers = 1000000", "at most 1000"]),
        ({"rope_interleaved": True}, ["rope_interleaved = True", "only False"]),
        ({"hidden_act": "gelu_tanh"}, ["hidden_act = 'gelu_tanh'", "silu"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "48"}, ["hidden_size = '48'", "whole number"]),
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
