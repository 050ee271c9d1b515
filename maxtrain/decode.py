"""Generate text with a trained model: `python -m maxtrain.decode RUN --prompt TEXT`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maxtrain.config import cli
from maxtrain.config.errors import Refused

if TYPE_CHECKING:
    from maxtrain.data.tokenizer import Tokenizer
    from maxtrain.training.program import Program

USAGE = "python -m maxtrain.decode RUN --prompt TEXT [--prompt TEXT ...] [--tokens N] [--temperature T] [--seed N]"
OPTIONS = {
    "prompt": "Text to go on from; may be given several times, may be empty.",
    "tokens": "Most new tokens for each prompt (128).",
    "temperature": "0 takes the likeliest token, 1 samples from the model's distribution (0.7).",
    "seed": "Seed of the sampling (0).",
}


def generate(program: Program, model: Any, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """The prompt's continuation, by a contiguous cache: the prompt in one call, then a token a call.

    Raises:
        Refused: prompt and new tokens are longer than the model's context.
    """
    import jax
    import jax.numpy as jnp

    from maxtrain.ops.attention import Context

    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) + tokens > program.config.model.max_length:
        raise Refused(f"a prompt of {len(ids)} tokens and {tokens} new ones exceed model.max_length={program.config.model.max_length}")

    def step(model: Any, caches: Any, token: jax.Array, positions: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        output = model(token, Context(positions, jnp.ones_like(positions)), caches)
        logits = model.logits(output.hidden[:, -1:])[:, 0, : tokenizer.vocab_size]
        drawn = jax.random.categorical(key, logits / temperature) if temperature else jnp.argmax(logits, axis=-1)
        return drawn.astype(jnp.int32)[:, None], output.caches

    run = jax.jit(step, donate_argnums=1)
    caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), program.state.model.cache_spec(1, len(ids) + tokens))
    token, positions, key, out = jnp.array([ids], jnp.int32), jnp.arange(len(ids))[None], jax.random.key(seed), []
    for index in range(tokens):
        token, caches = run(model, caches, token, positions, jax.random.fold_in(key, index))
        out.append(int(token[0, 0]))
        if out[-1] == tokenizer.eos_id:
            out.pop()
            break
        positions = jnp.array([[len(ids) + index]])
    return tokenizer.decode(out)


def main(argv: Sequence[str]) -> int:
    """Print a continuation of each prompt and add it to the run's samples.jsonl."""
    arguments = cli.parse(argv, usage=USAGE, options=OPTIONS, positional="RUN", overrides=False)
    prompts = arguments.options["prompt"]
    tokens = cli.number(arguments, "tokens", 128, int, minimum=1)
    temperature = cli.number(arguments, "temperature", 0.7, float, minimum=0)
    seed = cli.number(arguments, "seed", 0, int, minimum=0)
    if not prompts:
        raise Refused(f"no --prompt is given\nusage: {USAGE}")
    from maxtrain.training.run import open_run

    program, tokenizer, model, step = open_run(arguments.config)
    with open(os.path.join(arguments.config, "samples.jsonl"), "a") as file:
        for prompt in prompts:
            text = generate(program, model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)
            print(prompt + text, flush=True)
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
