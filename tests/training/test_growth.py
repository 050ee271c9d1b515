"""What a step takes from memory grows with the length, not with its square: every part of a model, training and scoring. Compiled only."""

import jax
import pytest
from programs import EXPERTS, MOE, build, make_config

from maxtrain.config import schema

TINY = {"vocab_size": 264, "embed": 32, "mlp": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "max_length": 1 << 14}
PARTS = {  # settings of the model, axes of the mesh
    "attention": ({}, {}),
    "windows, sinks": ({"slots": {"layer": schema.Slot(window=100)}, "attention_sinks": True}, {}),
    "softcap": ({"attention_softcap": 5.0, "final_softcap": 5.0}, {}),
    "latent": ({"mla": schema.Mla()}, {}),
    "dropless": ({"moe": schema.Moe(**EXPERTS)} | MOE, {}),
    "capacity": ({"moe": schema.Moe(**EXPERTS, dispatch="capacity")} | MOE, {}),
    "multi-token prediction": ({"mtp": schema.Mtp(num_layers=2)}, {}),
    "ring": ({}, {"context": 2}),
    "all_to_all": ({}, {"context": 2, "context_attention": "all_to_all"}),
    "gather": ({}, {"context": 2, "context_attention": "gather"}),
}


def temporaries(name, length, remat, scored):
    model, axes = PARTS[name]
    data = schema.Data(batch_size=1, length=length)
    program = build(
        make_config(schema.Model(**(TINY | model)), data=1, axes=axes, remat=schema.Remat(policy=remat)).model_copy(update={"data": data})
    )
    lowered = program.lower_eval(1, length) if scored else program.lower_step()
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_memory_of_a_step_grows_with_the_length(name, scored):
    remat = "none" if scored else "full"
    assert temporaries(name, 8192, remat, scored) <= 2.2 * temporaries(name, 4096, remat, scored)


@pytest.mark.slow
def test_rematerialisation_saves_memory_on_a_cpu():
    """Unrolled layers would be merged with those computed again."""
    assert jax.default_backend() == "cpu"
    kept = {policy: temporaries("attention", 4096, policy, False) for policy in ("none", "full")}
    assert kept["full"] < 0.75 * kept["none"]
