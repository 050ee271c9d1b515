"""Whatever the engine does to serve a request, the request gets the tokens and log-probabilities of the training forward."""

import itertools
import random

import jax
import numpy as np
import pytest
from engines import build, config_of, layout_of, log_softmax, logits, padded_logits, random_model, run, switched

from maxtrain import SamplingParams
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.decoder import Decoder
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.programs import Programs
from maxtrain.serving.step import make_step

MODELS = {
    "llama": {},
    "scan": {"layers": "scan"},
    "windows": {"slots": {"a": {"window": 9}, "b": {"window": 5}}, "layer_pattern": ["a", "b"], "num_layers": 3},
    "gemma": {
        "slots": {"local": {"window": 7}, "global": {}},
        "layer_pattern": ["local", "global"],
        "norm_placement": "sandwich",
        "norm": "rms_one_plus",
        "attention_softcap": 5.0,
        "final_softcap": 9.0,
        "tie_embeddings": True,
    },
    "sinks": {"attention_sinks": True, "qkv_bias": True, "qk_norm": "head", "num_kv_heads": 4},
    "latent": {
        "mla": {"q_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
        "rope": {"interleaved": True},
        "slots": {"first": {"window": 9}, "layer": {}},
        "prefix": ["first"],
        "layers": "scan",
    },
    "moe": {
        "slots": {"moe": {"feed_forward": "moe"}},
        "layer_pattern": ["moe"],
        "moe": {"num_experts": 4, "experts_per_token": 2, "mlp": 24},
    },
}
OFTEN = ("llama", "windows", "scan")  # seen by other tests of the short tier
SETS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.0, "seed": 3},
    "top_k": {"temperature": 1.4, "top_k": 4, "seed": 3},
    "top_p": {"temperature": 1.4, "top_p": 0.5, "seed": 3},
    "min_p": {"temperature": 1.4, "min_p": 0.4, "seed": 3},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "bias": {"temperature": 0.0, "logit_bias": {11: 4.0, 12: 4.0, 13: 4.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": list(range(5, 20)), "seed": 3},
    "held": {"temperature": 1.0, "stop_token_ids": list(range(0, 61, 2)), "min_tokens": 9, "seed": 3},
}
SWITCHES = {
    "starved": (False, True),
    "chunked": (False, True),
    "overlap": (True, False),
    "prefix_cache": (True, False),
    "speculate": (0, 3),
}
# Each value of each switch meets each value of every other
PAIRWISE = [(0, 0, 0, 0, 0), (0, 1, 1, 1, 1), (1, 0, 1, 0, 1), (1, 1, 0, 1, 0), (1, 1, 1, 0, 0), (1, 0, 0, 1, 1), (0, 1, 0, 0, 1)]


def prompts(seed=0, count=9, vocab=61):
    """Random prompts, half of which repeat themselves and begin alike."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, vocab, 17).tolist()
    made = []
    for index in range(count):
        own = rng.integers(0, vocab, rng.integers(1, 40)).tolist()
        made.append([*common, *own[:5], *own[:5]] if index % 2 else own)
    return made


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_scores_in_bfloat16_stay_near_float32(name):
    """Mean distance of a token's score from float32's: for the engine at most 1.5 times that of the training forward in bfloat16."""
    engine, half = build(compute="bfloat16", **MODELS[name])
    config = config_of(**MODELS[name])
    exact = random_model(config, layout_of(config))
    requests = [engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)) for prompt in prompts()]
    run(engine, *requests)
    found, forward = [], []
    for request in requests:
        tokens = request.prompt
        rough, want = (log_softmax(padded_logits(model, tokens)) for model in (half, exact))
        for place, (own, *_) in request.data.scored.items():
            found.append(own - want[place - 1, tokens[place]])
            forward.append(rough[place - 1, tokens[place]] - want[place - 1, tokens[place]])
    assert 0 < np.abs(found).mean() < 1.5 * np.abs(forward).mean() < 0.2
    assert np.abs(found).max() < 1


ONE_SHAPE = [(name, {"deterministic": True}) for name in MODELS if name not in OFTEN]  # a program each, of the eight or so
ALL_SHAPES = [pytest.param(name, {}, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize(("name", "serve"), ONE_SHAPE + ALL_SHAPES)
def test_greedy_tokens_and_scores_are_those_of_the_training_forward(name, serve):
    engine, model = build(serve, **MODELS[name])
    asked = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, prompt_logprobs=1)
    requests = [engine.add(prompt, asked) for prompt in prompts()]
    for request, output in zip(requests, run(engine, *requests), strict=True):
        want = padded_logits(model, request.tokens)
        start, scores = len(request.prompt), log_softmax(want)
        assert output == want[start - 1 : -1].argmax(-1).tolist()
        for place, (own, likeliest) in enumerate(request.data.logprobs, start - 1):
            assert own == pytest.approx(scores[place].max(), rel=1e-4, abs=1e-4)
            assert list(likeliest) == np.argsort(-scores[place])[:2].tolist()
        assert sorted(request.data.scored) == list(range(1, start))
        for place, (own, greedy, likeliest) in request.data.scored.items():
            assert own == pytest.approx(scores[place - 1, request.prompt[place]], rel=1e-4, abs=1e-4)
            assert greedy == (request.prompt[place] == scores[place - 1].argmax())
            assert list(likeliest) == [scores[place - 1].argmax()]
    if name == "windows":
        assert engine.scheduler.window == 9


def outputs(engine, names):
    """Tokens and log-probabilities for each parameter set, all in one batch, in two orders of arrival."""
    requests = []
    for name in names:
        requests += [(name, engine.add(prompt, SamplingParams(max_tokens=14, logprobs=0, **SETS[name]))) for prompt in prompts()[:4]]
    run(engine)
    found = {}
    for name, request in requests:
        found.setdefault(name, []).append((request.tokens[len(request.prompt) :], [own for own, _ in request.data.logprobs]))
    return found


@pytest.fixture(scope="module")
def plain(llama):
    """With nothing on, one request at a time."""
    with switched(llama[0], overlap=False, prefix_cache=False):
        found = {}
        for name in SETS:
            for prompt in prompts()[:4]:
                request = llama[0].add(prompt, SamplingParams(max_tokens=14, logprobs=0, **SETS[name]))
                run(llama[0])
                found.setdefault(name, []).append((request.tokens[len(request.prompt) :], [own for own, _ in request.data.logprobs]))
    return found


def test_every_parameter_set_changes_the_output(plain):
    for a, b in itertools.combinations(SETS, 2):
        assert [tokens for tokens, _ in plain[a]] != [tokens for tokens, _ in plain[b]], (a, b)


def check(llama, plain, values):
    engine, _ = llama
    before = engine.scheduler.num_preemptions, engine.stats.accepted, engine.scheduler.num_hits
    with switched(engine, **{name: options[value] for (name, options), value in zip(SWITCHES.items(), values, strict=True)}):
        found = outputs(engine, SETS)
    for name in SETS:
        for (tokens, scores), (want, wanted) in zip(found[name], plain[name], strict=True):
            assert tokens == want, name
            np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-5)
    after = engine.scheduler.num_preemptions, engine.stats.accepted, engine.scheduler.num_hits
    starved, _, _, without_cache, speculate = values
    assert (after[0] > before[0]) == bool(starved)
    assert (after[1] > before[1]) == bool(speculate)
    assert (after[2] > before[2]) == (not without_cache)


@pytest.mark.parametrize("values", PAIRWISE)
def test_nothing_changes_tokens(llama, plain, values):
    check(llama, plain, values)


@pytest.mark.slow
@pytest.mark.parametrize("values", [values for values in itertools.product((0, 1), repeat=5) if values not in PAIRWISE])
def test_nothing_changes_tokens_in_the_whole_product(llama, plain, values):
    check(llama, plain, values)


def test_deterministic_mode_is_bitwise_the_same_alone_or_in_any_batch():
    engine, _ = build({"deterministic": True})
    assert len(engine.programs.shapes) == 1
    asked = SamplingParams(temperature=1.0, seed=1, max_tokens=10, logprobs=3, prompt_logprobs=3)

    def exact(request):
        return request.tokens, request.data.logprobs, request.data.scored

    alone = []
    for prompt in prompts():
        request = engine.add(prompt, asked)
        run(engine)
        alone.append(exact(request))
        engine.scheduler.pool.forget_all()
    order = list(range(9))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        with switched(engine, starved=seed == 1, chunked=seed == 2):
            requests = {index: engine.add(prompts()[index], asked) for index in order}
            run(engine)
        for index, request in requests.items():
            assert exact(request) == alone[index]


def test_nothing_is_compiled_while_serving(llama):
    engine, events = llama[0], []
    run(engine, engine.add([1, 2], SamplingParams(max_tokens=2)))
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    for asked in SETS.values():
        for length in (1, 7, 30, 70):
            engine.add([length % 61] * length, SamplingParams(max_tokens=10, prompt_logprobs=2, logprobs=1, **asked))
    run(engine)
    assert not [event for event in events if "compile" in event]


def test_seeds_and_samples(llama):
    engine = llama[0]
    same = [engine.add([1, 2, 3], SamplingParams(seed=7, max_tokens=12)) for _ in range(2)]
    other = [engine.add([1, 2, 3], SamplingParams(max_tokens=12)) for _ in range(3)]
    run(engine)
    assert same[0].tokens == same[1].tokens
    assert len({tuple(request.tokens) for request in (*same, *other)}) == 4


def test_new_weights_never_meet_old_keys(llama):
    engine, model = llama
    changed = jax.tree.map(lambda x: x * 1.1, model)
    before, prompt = engine.stats.relayouts, prompts()[1]
    asked = SamplingParams(temperature=0.0, max_tokens=10)
    run(engine, engine.add(prompt, asked))
    running = engine.add(prompt, asked)
    for _ in range(4):
        engine.step()
    engine.load(changed, version=7)
    known = len(running.tokens)
    after = engine.add(prompt, asked)
    run(engine)
    assert known > len(prompt)
    want = padded_logits(changed, after.tokens)
    assert after.tokens[len(prompt) :] == want[len(prompt) - 1 : -1].argmax(-1).tolist()
    rest = padded_logits(changed, running.tokens)  # the request that was under way goes on with the new weights
    assert running.tokens[known:] == rest[known - 1 : -1].argmax(-1).tolist()
    engine.load(model)
    assert (engine.version, engine.stats.relayouts) == (8, before + 2)


def test_what_load_reads_is_news_of_the_next_step(llama):
    engine, model = llama
    request = engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=1))
    assert engine.step() == []
    engine.load(model)
    assert (request.finish_reason, engine.busy) == ("length", True)
    assert engine.step() == [request]
    assert not engine.busy


def test_weights_of_another_model_are_refused_before_anything_is_dropped(llama):
    engine, model = llama
    request = engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=9))
    engine.step()
    version = engine.version
    deleted = jax.tree.map(lambda x: x + 0, model)
    jax.tree.map(lambda x: x.delete(), deleted)
    for wrong, message in (
        (jax.tree.map(lambda x: x[:1], model), r"another model's: .* is float32 \[1, 16\], but float32 \[32, 16\]"),
        (jax.tree.map(lambda x: x.astype("bfloat16"), model), "another model's: .* is bfloat16"),
        (jax.tree.map(np.asarray, model), "have a ndarray as body/0/layers/0"),
        (jax.tree.map(lambda x: jax.device_put(x, jax.devices()[1]), model), "have body/0/layers/0/.* laid out as"),
        (deleted, "were given away"),
        ([model, model], "arrays cannot take the place"),
        ("runs/tiny", "1 arrays cannot take the place"),
    ):
        with pytest.raises(Refused, match=message):
            engine.load(wrong)
    assert engine.version == version
    (tokens,) = run(engine, request)
    assert len(tokens) == 9
    assert request.preemptions == 0


def test_two_engines_in_one_process_share_no_trace():
    """On meshes of equal shapes, whose traces jax takes for the same: each engine's program names its own devices."""
    config = config_of({"tensor": 2, "fsdp": 2}, vocab_size=64)
    model = Decoder(config.model, config.precision, schema.Remat(policy="none"))
    for devices in (jax.devices()[:4], jax.devices()[4:]):
        layout = Layout(mesh.make_mesh(config.mesh, devices), config.mesh.rules)
        programs = Programs(config, layout, 64)
        with sharding.use(programs.layout):
            step = jax.jit(make_step(64, 0)).trace(model, programs.spec, programs._abstract(programs.inputs(programs.shapes[0])))
        found = [eqn.params["sharding"] for eqn in equations(step.jaxpr.jaxpr) if eqn.primitive.name == "sharding_constraint"]
        assert {device for place in found for device in place.mesh.devices.flat} == set(devices)


def equations(jaxpr):
    """All of a program, those within others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 61], {}, "the token 61; the vocabulary ends at 60"),
        (list(range(60)), {"max_tokens": 40}, "60 tokens and max_tokens=40 exceed the context of 96"),
        ([1] * 96, {"max_tokens": None}, "96 tokens and one new token exceed"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias names the token 99"),
        ([1], {"stop": "x"}, "no tokenizer"),
        ([1], {"allowed_token_ids": [4], "stop_token_ids": [4], "min_tokens": 1}, "all allowed_token_ids end the output"),
    ],
)
def test_a_bad_request_is_refused_and_others_go_on(llama, prompt, asked, message):
    engine = llama[0]
    other = engine.add([1, 2], SamplingParams(max_tokens=4))
    with pytest.raises(Refused, match=message):
        engine.add(prompt, SamplingParams(**{"max_tokens": 20} | asked))
    assert len(run(engine, other)[0]) == 4


def soak(engine, count, seed):
    """Requests of random lengths that arrive at random, some of which are aborted; asserts that the others are right."""
    rng, every, checked = random.Random(seed), [], {}
    waiting = list(range(count))
    while waiting or engine.busy:
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            if waiting:
                index = waiting.pop()
                prompt = [index % 61, *(rng.randrange(61) for _ in range(rng.randrange(0, 3)))] * rng.randint(1, 9)
                asked = SamplingParams(max_tokens=rng.randint(1, 40), temperature=rng.choice((0.0, 1.0)))
                every.append((engine.add(prompt, asked, priority=rng.choice((0, 0, 1))), rng.random() < 0.3))
        if every and rng.random() < 0.3:
            request, unlucky = rng.choice(every)
            if unlucky:
                engine.abort(request)
        for request, unlucky in every:
            if unlucky and request.num_output >= 3 and rng.random() < 0.2:
                engine.abort(request)
        engine.step()
    assert len(every) == count
    for request, _ in every:
        assert request.finish_reason in ("length", "abort")
        if request.finish_reason == "length":
            assert len(request.tokens) == len(request.prompt) + request.max_tokens
            if not request.params.temperature:
                checked[request.id] = request
    assert engine.scheduler.num_preemptions > 0
    return every, list(checked.values())


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_soak(llama, count):
    engine, model = llama
    pages = engine.scheduler.pool.take(engine.scheduler.pool.num_free - 30)
    try:
        engine.scheduler.num_preemptions, check, engine.scheduler.check = 0, engine.scheduler.check, lambda: None
        every, checked = soak(engine, count, seed=count)
    finally:
        engine.scheduler.check = check
        engine.scheduler.pool.release(pages)
        engine.scheduler.check()
    assert sum(request.finish_reason == "abort" for request, _ in every) > count * 0.15
    for request in checked:
        want = padded_logits(model, request.tokens)
        assert request.tokens[len(request.prompt) :] == want[len(request.prompt) - 1 : -1].argmax(-1).tolist()


MESHES = {
    "tensor": {"tensor": 2, "fsdp": 2, "data": 2},
    "heads repeated": {"tensor": 4, "fsdp": 2},
    "expert": {"expert": 4, "tensor": 2},
    "latent": {"tensor": 4, "fsdp": 2},
}


@pytest.mark.parametrize("name", ["tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name != "tensor")])
def test_eight_devices_give_what_one_gives(name):
    model = MODELS[{"expert": "moe", "latent": "latent"}.get(name, "scan")]
    model = model | {"vocab_size": 64}
    found = []
    for devices, axes in ((1, {}), (8, MESHES[name])):
        engine, _ = build({"max_requests": 8}, devices, axes, **model)
        asked = [SamplingParams(max_tokens=8, logprobs=0, prompt_logprobs=0, **SETS[key]) for key in ("greedy", "top_p", "penalties")]
        requests = [engine.add(prompt, params) for prompt in prompts()[:3] for params in asked]
        run(engine)
        found.append([(r.tokens, [own for own, _ in r.data.logprobs] + [own for own, *_ in r.data.scored.values()]) for r in requests])
    for (tokens, scores), (want, wanted) in zip(found[1], found[0], strict=True):
        assert tokens == want
        np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_longrope_is_served_within_the_original_length():
    factors = {"short_factors": [1.0, 1.5, 2.0, 2.5], "long_factors": [2.0, 3.0, 4.0, 5.0]}
    rope = {"scaling": {"kind": "longrope", "factor": 4.0, "original_length": 32, **factors}}
    engine, model = build(rope=rope)
    assert engine.max_length == 32
    prompt = np.random.default_rng(0).integers(0, 61, 20).tolist()
    (output,) = run(engine, engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=12)))
    assert output == logits(model, [*prompt, *output])[19:31].argmax(-1).tolist()
    with pytest.raises(Refused, match=r"serve\.max_length=33 is longer than rope\.scaling\.original_length=32: it turns"):
        build(serve={"max_length": 33}, rope=rope)
