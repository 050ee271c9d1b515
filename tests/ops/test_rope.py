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


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """Pairs that turn more than 32 times over the original length are kept, less than once divided; queries and keys grow."""
    scaling = schema.RopeScaling(kind="yarn", factor=8.0, original_length=4096, truncate=False)
    plain, scaled = (rope.frequencies(schema.Rope(scaling=s), 128).astype(np.float64) for s in (None, scaling))
    turns = 4096 * plain / (2 * math.pi)
    np.testing.assert_allclose(scaled[turns >= 32], plain[turns >= 32], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns <= 1], plain[turns <= 1] / 8, rtol=1e-6)
    between = scaled[(turns < 32) & (turns > 1)] / plain[(turns < 32) & (turns > 1)]
    assert (np.diff(between) < 0).all()
    assert ((between > 1 / 8) & (between < 1)).all()


def test_yarn_mscale():
    """0.1 m ln(factor) + 1; DeepSeek's rotated part is divided by the factor of the whole, and an explicit factor wins."""

    def factor(**keys):
        return schema.RopeScaling(kind="yarn", factor=40.0, **keys).rotation_factor

    assert math.isclose(factor(), 0.1 * math.log(40) + 1)
    assert math.isclose(factor(mscale=0.707, mscale_all_dim=0.707), 1.0)
    assert math.isclose(factor(mscale=2.0, mscale_all_dim=0.5), (0.2 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
    assert factor(attention_factor=1.5) == 1.5
    cos, sin = rope.angles(np.array([[3]]), schema.Rope(scaling=schema.RopeScaling(kind="yarn", factor=40.0)), 16)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(40) + 1) ** 2, rtol=1e-5)


def test_longrope_divides_by_the_length_of_the_document():
    """Documents of one row on their own: up to the original length by the short factors, beyond it by the long ones."""
    scaling = schema.RopeScaling(kind="longrope", factor=4.0, original_length=4, short_factors=(1.0, 2.0), long_factors=(3.0, 8.0))
    cfg = schema.Rope(theta=100.0, scaling=scaling)
    positions = np.concatenate([np.arange(4), np.arange(5), np.arange(3)])[None]
    segments = np.repeat([1, 2, 3], [4, 5, 3])[None]
    cos, sin = rope.angles(positions, cfg, 4, segments)
    divisors = np.where((segments == 2)[..., None], scaling.long_factors, scaling.short_factors)
    phase = positions[..., None] / (divisors * 100.0 ** np.array([0.0, 0.5]))
    factor = math.sqrt(1 + math.log(4) / math.log(4))
    np.testing.assert_allclose(cos, factor * np.cos(phase), atol=1e-6)
    np.testing.assert_allclose(sin, factor * np.sin(phase), atol=1e-6)
    np.testing.assert_array_equal(rope.angles(positions, cfg, 4)[0][0, :4], cos[0, :4])  # serving: within the original length


def test_dynamic_base_grows_with_the_document():
    """Documents of one row on their own: the base grows with the length beyond the original one."""
    cfg = schema.Rope(theta=100.0, scaling=schema.RopeScaling(kind="dynamic", factor=3.0, original_length=4))
    positions = np.concatenate([np.arange(4), np.arange(6)])[None]
    cos, _ = rope.angles(positions, cfg, 8, np.repeat([1, 2], [4, 6])[None])
    theta = np.repeat([100.0, 100.0 * (3.0 * 6 / 4 - 2.0) ** (8 / 6)], [4, 6])[None, :, None]
    np.testing.assert_allclose(cos, np.cos(positions[..., None] / theta ** (np.arange(0, 8, 2) / 8)), atol=1e-5)
    np.testing.assert_array_equal(rope.angles(positions, cfg, 8)[0][0, :4], cos[0, :4])  # serving: within the original length


def test_partial_and_interleaved():
    """Only the first part of a head turns; neighbours and halves are the same rotation in another order."""
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 16)).astype(np.float32)
    cos, sin = rope.angles(np.arange(5)[None], schema.Rope(fraction=0.5), 16)
    assert cos.shape == (1, 5, 4)
    halves, neighbours = (np.asarray(rope.rotate(x, cos, sin, interleaved=i)) for i in (False, True))
    for turned in (halves, neighbours):
        np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
        assert np.abs(turned[:, 1:, :, :8] - x[:, 1:, :, :8]).max() > 0.1
    order = np.r_[0:8:2, 1:8:2]
    np.testing.assert_array_equal(np.asarray(rope.rotate(x[..., order], cos, sin)), neighbours[..., order])
