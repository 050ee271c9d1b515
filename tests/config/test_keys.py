"""The keys of a config are a promise to users: a change of their list is seen in review, and each key explains itself."""

from pathlib import Path

import pytest

from maxtrain.config import keys
from maxtrain.config.schema import Config

GOLDEN = Path(__file__).parents[1] / "golden" / "config_keys.txt"


def test_keys_are_the_golden_ones():
    # python -c "from maxtrain.config import keys; print(*(path for path, _ in keys.walk()), sep='\n')" > tests/golden/config_keys.txt
    assert [path for path, _ in keys.walk()] == GOLDEN.read_text().splitlines()


def test_every_key_has_a_docstring():
    named = {
        f"{mapping}.{name}"
        for mapping in ("mesh.rules", "mesh.dcn", "data.sources", "eval.sets", "model.slots", "serve.sampling.logit_bias", "eval.questions")
        for name in keys.children(keys.at(mapping))
    }
    assert [path for path, field in keys.walk() if not field.description and path not in {*Config.model_fields, *named}] == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("train.steps", "a whole number >= 1"),
        ("optimizer.b1", "a number >= 0 and < 1"),
        ("optimizer.clip_norm", "a number > 0 or null"),
        ("precision.compute", "float32, bfloat16, float16 or auto"),
        ("optimizer.decay", "a list of matrix, embedding, norm or bias"),
        ("mesh.num_processes", "a whole number >= 1 or auto"),
        ("model.rope", "a section (theta, fraction, interleaved, scaling)"),
        ("checkpoint.resume", "true or false"),
        ("run.dir", "text or null"),
        ("data.sources.any.weight", "a number > 0"),
        ("mesh.rules.embed", "a list of stage, data, fsdp, expert, context or tensor"),
    ],
)
def test_allowed_says_type_and_bounds(path, words):
    assert keys.allowed(keys.at(path)) == words


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning_rate", "schedule.learning_rate"),
        ("optimizer.learning_rate", "schedule.learning_rate"),
        ("optimiser", "optimizer"),
        ("tokenizer", "data.tokenizer"),
        ("train.max_steps", "train.steps"),
        ("train.batch_size", "data.batch_size or eval.batch_size"),
        ("model.rope.thta", "model.rope.theta"),
        ("data.sources.web.pth", "data.sources.web.path"),
        ("mesh.rules.embd", "mesh.rules.embed"),
    ],
)
def test_nearest_finds_what_was_meant(wrong, meant):
    assert keys.nearest(wrong) == f"; did you mean {meant}?"


def test_nearest_lists_the_section_when_nothing_is_near():
    assert keys.nearest("remat.xyzzy") == "; remat has policy"


def test_at_is_none_for_what_does_not_exist():
    assert keys.at("train.steps.more") is None
    assert keys.at("mesh.rules.nothing") is None
