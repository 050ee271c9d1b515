"""The peak of a CPU, remembered where that is possible."""

import json

import jax
import pytest

from maxtrain.training import hardware


@pytest.mark.parametrize("text", [None, "[1, 2]", '{"a": "b"}', '{"a": []}', "{", "5"])
def test_a_cache_that_cannot_be_used_does_not_matter(tmp_path, monkeypatch, text):
    monkeypatch.setattr(hardware, "measure", lambda device: 0.5)
    cache = tmp_path / "home" / "peak.json"
    if text is None:
        (tmp_path / "home").write_text("a file where the folder should be")  # as root, rights alone stop nothing
    else:
        cache.parent.mkdir()
        cache.write_text(text)
    assert hardware.peak_tflops(jax.devices()[0], str(cache)) == 0.5 / jax.local_device_count()
    assert text is None or 0.5 in json.loads(cache.read_text()).values()


def test_the_best_measurement_counts(tmp_path, monkeypatch):
    for found, best in ((0.5, 0.5), (0.8, 0.8), (0.2, 0.8)):
        monkeypatch.setattr(hardware, "measure", lambda device, found=found: found)
        assert hardware.peak_tflops(jax.devices()[0], str(tmp_path / "peak.json")) == best / jax.local_device_count()
