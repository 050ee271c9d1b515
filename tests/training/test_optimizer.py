"""What is refused before anything is trained, and the formats of the moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.training.optimizer import check_trainable, make_optimizer


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"precision": schema.Precision(compute="float16")}, "precision.compute=float16: .* write bfloat16"),
        ({"precision": schema.Precision(params="float16")}, "precision.params=float16"),
        ({"optimizer": schema.Optimizer(b2=1 - 2**-26)}, r"optimizer.b2=0.9999999851 cannot be told from 1 in float32"),
        ({"optimizer": schema.Optimizer(b1=1 - 2**-26)}, r"optimizer.b1"),
        ({"optimizer": schema.Optimizer(eps=1e-46)}, "optimizer.eps=1e-46 cannot be told from 0 in float32: write a number >= 1.18e-38"),
        ({"optimizer": schema.Optimizer(clip_norm=1e-39)}, "optimizer.clip_norm"),
    ],
)
def test_what_cannot_train_is_refused(section, message):
    with pytest.raises(Refused, match=message):
        check_trainable(schema.Config(**section))


def test_what_can_train_is_not():
    check_trainable(schema.Config())
    check_trainable(schema.Config(optimizer=schema.Optimizer(b1=0.0, b2=1 - 2**-24, clip_norm=None)))


@pytest.mark.parametrize(("params", "second"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_the_second_moment_has_the_format_that_the_config_names(params, second):
    """At b2 = 0.999 a second moment in bfloat16 does not come down from 1 at all; in float32 it does, whatever the parameters are."""
    optimizer = make_optimizer(schema.Optimizer(b2=0.999), schema.Precision(params=params, second_moment=second))
    state = optimizer.init({"w": jnp.ones(4, params)})
    assert state.nu["w"].dtype == second
    state = state._replace(nu={"w": jnp.ones(4, second)})
    update = jax.jit(optimizer.update)
    for _ in range(100):
        direction, state = update({"w": jnp.zeros(4, params)}, state)
    assert (direction["w"].dtype, state.mu["w"].dtype, state.nu["w"].dtype) == ("float32", "float32", second)
    np.testing.assert_allclose(np.asarray(state.nu["w"], np.float32), 0.999**100 if second == "float32" else 1.0, rtol=1e-5)
