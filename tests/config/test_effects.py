"""Keys that are accepted and change nothing are named, one a row; what has an effect is not."""

from pathlib import Path

import pytest

from maxtrain.config import load
from maxtrain.config.effects import without_effect

ROOT = Path(__file__).parents[2]
SETS = "eval.sets={x: {kind: stdlib, split: heldout}}"
ROWS = [  # overrides, the key that has no effect, the reason
    ("data.tokenizer.train_bytes=5", "data.tokenizer.train_bytes", "kind: byte is not trained"),
    ("eval.prompts=[a] eval.length=64", "eval.length", "eval.sets is empty"),
    ("eval.prompts=[a] eval.stride=64", "eval.stride", "eval.sets is empty"),
    ("eval.prompts=[a] eval.batch_size=4", "eval.batch_size", "eval.sets is empty"),
    ("eval.prompts=[a] eval.every=500", "eval.every", "the run ends at step 100"),
    ("mesh.process_id=0", "mesh.process_id", "mesh.num_processes is 1"),
    ("mesh.rules.heads=[context]", "mesh.rules.heads", "context has one device"),
    (
        "model.mlp=99 model.slots.layer.feed_forward=moe model.moe={num_experts: 2, experts_per_token: 1, mlp: 8}",
        "model.mlp",
        "every layer has experts",
    ),
    ("model.rope.theta=5 model.slots.layer.rope={theta: 7}", "model.rope", "has its own rope"),
    ("model.rope.theta=5 model.slots.layer.rotary=false", "model.rope", "has its own rope or none"),
    ("model.slots={layer: {}, other: {window: 5}}", "model.slots.other", "none of the 2 layers is of this kind"),
    ("metrics.sinks=[jsonl] metrics.console_every=5", "metrics.console_every", "no console"),
    ("metrics.profile.start=100", "metrics.profile", "the run ends at step 100"),
    ("guard.spike_sigmas=null guard.window=64", "guard.window", "guard.spike_sigmas is null"),
    ("optimizer.weight_decay=0 optimizer.decay=[norm]", "optimizer.decay", "optimizer.weight_decay is 0"),
    ("optimizer.weight_decay=0.5 optimizer.decay=[]", "optimizer.weight_decay", "names no kind"),
    ("data.sources.stdlib={kind: stdlib, weight: 3}", "data.sources.stdlib.weight", "there is one source"),
    ("train.loss_chunk=512", "train.loss_chunk", "sequences have 256 tokens"),
    ("checkpoint.every=500", "checkpoint.every", "the run ends at step 100"),
    ("checkpoint.every=20 checkpoint.keep_every=30", "checkpoint.keep_every", "no multiple of checkpoint.every=20"),
    ("serve.speculate=2 serve.draft=mtp", "serve.draft", "model.mtp is null"),
]


def overrides(text):
    """The words of a row: a blank within braces or brackets separates none."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        words = [*words, ""] if letter == " " and not depth else [*words[:-1], words[-1] + letter]
    return words


@pytest.mark.parametrize(("text", "key", "reason"), ROWS, ids=[key for _, key, _ in ROWS])
def test_key_without_effect_is_named(text, key, reason):
    (found,) = without_effect(load(None, overrides(text)).config)
    assert found.startswith(f"{key}=")
    assert reason in found


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{SETS} eval.length=64 eval.stride=8 eval.batch_size=4 eval.every=50",
        "checkpoint.every=20 checkpoint.keep_every=40",
        "data.sources={a: {kind: stdlib, weight: 3}, b: {kind: synthetic}}",
        "data.tokenizer={kind: bpe, vocab_size: 300, train_bytes: 5} model.vocab_size=300",
        "model.rope.theta=5 model.slots={layer: {}, other: {rope: {theta: 7}}} model.layer_pattern=[layer, other]",
    ],
)
def test_keys_with_an_effect_are_not_named(text):
    assert without_effect(load(None, overrides(text) if text else ()).config) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yml")), ids=lambda path: path.stem)
def test_shipped_configs_set_nothing_in_vain(path):
    assert without_effect(load(path).config) == []
