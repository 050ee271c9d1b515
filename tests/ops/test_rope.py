"""Rotary embedding: relative positions only, and Llama 3.1's published scaling."""

import math

import numpy as np

from maxtrain.config import schema
from maxtrain.ops import rope


def test_products_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(i, j):
        turned = [rope.rotate(x, *rope.angles(np.array([[at]]), schema.Rope(theta=100.0), 16)) for x, at in ((q, i), (k, j))]
        return float(np.sum(turned[0] * turned[1]))

    assert math.isclose(product(7, 3), product(104, 100), rel_tol=1e-4)
    assert not math.isclose(product(7, 3), product(8, 3), rel_tol=1e-3)


def test_llama3_scaling_by_wavelength():
    """The formula as Meta published it, band by band (not the blended form of the implementation)."""
    scaling = schema.RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    base = rope.frequencies(schema.Rope(theta=500000.0), 128).astype(np.float64)
    want = []
    for f in base:
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            want.append(f)
        elif wavelength > 8192 / 1:
            want.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * f / 8 + smooth * f)
    got = rope.frequencies(schema.Rope(theta=500000.0, scaling=scaling), 128)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len({*np.isclose(got, base)}) == 2  # some kept, some changed
