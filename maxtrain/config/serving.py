"""Keys of the engine that generates and scores, and what a request may ask of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from maxtrain.config.section import (
    Fraction,
    FrozenDict,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    freeze,
)

MAX_LOGPROBS = 20


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else freeze(value)


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)]
Tokens = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(freeze)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingParams(Section):
    """How tokens are chosen: penalties and biases act on the logits first, then temperature, then min-p, top-k and top-p."""

    n: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Samples of each prompt."""
    temperature: NonNegativeFloat = 1.0
    """0 takes the likeliest token, 1 samples from the model's distribution."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens, and those as likely as the last of them; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Keep tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens in prompt and output are divided by this if they are positive, else multiplied (Keskar et al., 2019)."""
    presence_penalty: Number = 0.0
    """Taken off the logit of every token that the output has."""
    frequency_penalty: Number = 0.0
    """Taken off a token's logit as often as the output has it."""
    logit_bias: dict[NonNegativeInt, Number] = FrozenDict()
    """Added to the logits of these token ids."""
    allowed_token_ids: Tokens | None = None
    """Only these tokens are generated; null for all."""
    bad_words: Texts = ()
    """Texts whose tokens are never generated in this order."""
    stop: Texts = ()
    """Texts that end the output; they are not part of it."""
    include_stop: bool = False
    """Keep the text that ended the output."""
    stop_token_ids: Tokens = ()
    """Tokens that end the output, beside the model's end tokens."""
    ignore_eos: bool = False
    """The model's end tokens do not end the output."""
    max_tokens: PositiveInt | None = 128
    """Most tokens of an output; null for as many as the context holds."""
    min_tokens: NonNegativeInt = 0
    """Nothing ends the output before it has so many tokens."""
    seed: Seed | None = None
    """Seed of the noise; null draws one from `serve.seed`."""
    logprobs: NumLogprobs | None = None
    """Log-probabilities, by the model alone, of each new token and of so many likeliest ones; null for none."""
    prompt_logprobs: NumLogprobs | None = None
    """The same for the tokens of the prompt, each given those before it."""

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _read_bias(cls, value: Any) -> Any:  # a key of JSON is text
        return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> SamplingParams:
        problems = []
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problems.append(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.temperature == 0 and self.n > 1:
            problems.append(f"n={self.n} with temperature=0 would give the same output each time")
        if self.temperature == 0 and {"top_k", "top_p", "min_p", "seed"} & self.changed:
            named = ", ".join(sorted({"top_k", "top_p", "min_p", "seed"} & self.changed))
            problems.append(f"{named} has no effect with temperature=0, which takes the likeliest token")
        if self.allowed_token_ids == ():
            problems.append("allowed_token_ids is empty: no token could be generated")
        if self.include_stop and not self.stop:
            problems.append("include_stop has no effect without stop")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Serve(Section):
    """The engine that generates and scores text."""

    max_requests: PositiveInt = 32
    """Requests that run at the same time; more wait."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its output together; `model.max_length` when null."""
    memory_gib: PositiveFloat | None = None
    """Memory of the cache on each device; null takes at most 1 on CPU, else half of what is free."""
    page_size: PositiveInt = 8
    """Tokens of a page of the cache. A request wastes half a page; a kernel for TPU wants 32 or more."""
    block: PositiveInt = 32
    """Tokens of a prompt that one block computes."""
    num_blocks: PositiveInt = 8
    """Blocks of a step; a longer prompt is computed in several steps."""
    prefix_cache: bool = True
    """Prompts that begin alike share what has been computed for the beginning."""
    overlap: bool = True
    """Start a step before the tokens of the one before are read."""
    deterministic: bool = False
    """One program for all steps: outputs are bitwise the same, whatever else is in the batch."""
    speculate: Annotated[int, Field(ge=0, le=1024)] = 0
    """Tokens guessed and checked in one step; 0 for none. Outputs stay the same."""
    draft: Literal["auto", "ngram", "mtp"] = "auto"
    """Who guesses: `ngram` looks up what stood in the request before, `mtp` is the model's multi-token prediction,
    `auto` takes `mtp` where the model has it."""
    seed: Seed = 0
    """Seed for requests without one."""
    sampling: SamplingParams = SamplingParams()
    """What requests ask for unless they say otherwise."""

    @model_validator(mode="after")
    def _check(self) -> Serve:
        if "draft" in self.changed and not self.speculate:
            raise ValueError("draft has no effect with speculate=0: set how many tokens to guess, or remove it")
        return self
