"""The section `model.rope`: rotary position embedding and its scaling to contexts beyond the length trained on."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from maxtrain.config.section import Fraction, PositiveFloat, PositiveFloats, PositiveInt, Section

READ_BY = {  # which kinds of scaling read a key; the others are refused with it
    "original_length": ("llama3", "yarn", "longrope", "dynamic"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
    "mscale": ("yarn",),
    "mscale_all_dim": ("yarn",),
    "truncate": ("yarn",),
    "short_factors": ("longrope",),
    "long_factors": ("longrope",),
}


class RopeScaling(Section):
    """Frequency scaling of rotary embeddings for contexts beyond the original training length."""

    kind: Literal["llama3", "linear", "yarn", "longrope", "dynamic"] = "llama3"
    """`llama3`: interpolation by wavelength as in Llama 3.1 (section 3.4.3 of its report and its published config). `linear`: all positions
    divided by the factor (Chen et al., 2023). `yarn`: interpolation by number of turns, with sharper attention (Peng et al., 2023).
    `longrope`: a divisor for each pair, others in a document that is longer than the original length (Ding et al., 2024; Phi-3).
    `dynamic`: the base grows with a document beyond the original length ("dynamic NTK", of Llama's fine-tunes)."""
    factor: PositiveFloat = 8.0
    """How many times the context is stretched; of effect on `attention_factor` alone in longrope."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above `original_length / low_freq_factor` are divided by `factor` in full (llama3)."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below `original_length / high_freq_factor` are left as they are (llama3)."""
    original_length: PositiveInt = 8192
    """Context length before the stretch, in tokens (llama3, yarn, longrope, dynamic)."""
    beta_fast: PositiveFloat = 32.0
    """Pairs that turn more often than this over the original length are left as they are (yarn)."""
    beta_slow: PositiveFloat = 1.0
    """Pairs that turn less often than this over the original length are divided by `factor` in full (yarn)."""
    attention_factor: PositiveFloat | None = None
    """Factor on queries and keys; null derives it from `factor`, `mscale` and `mscale_all_dim` (yarn) or is
    sqrt(1 + ln(factor) / ln(original_length)) (longrope)."""
    mscale: PositiveFloat | None = None
    """Slope m of the factor 0.1 m ln(factor) + 1 on queries and keys, together with `mscale_all_dim`; 1 when null (yarn)."""
    mscale_all_dim: PositiveFloat | None = None
    """The same for the whole attention of DeepSeek, by which the factor of the rotated part is divided; together with `mscale` (yarn)."""
    truncate: bool = True
    """Round the bounds between kept and stretched pairs to whole pairs (yarn)."""
    short_factors: PositiveFloats = ()
    """Divisor of each pair's frequency in documents of at most `original_length` tokens (longrope)."""
    long_factors: PositiveFloats = ()
    """The same in longer documents (longrope)."""

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        if self.beta_fast < self.beta_slow:
            raise ValueError("beta_fast must not be below beta_slow")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim only have an effect together: set both or none")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("mscale has no effect beside attention_factor: remove one of them")
        for name in sorted(self.changed & set(READ_BY)):
            if self.kind not in READ_BY[name]:
                raise ValueError(f"{name} has no effect with kind: {self.kind}; it is read by {' and '.join(READ_BY[name])}")
        if self.kind == "longrope" and not len(self.short_factors) == len(self.long_factors) > 0:
            counts = f"{len(self.short_factors)} and {len(self.long_factors)}"
            raise ValueError(f"longrope needs as many short_factors as long_factors, one for each rotated pair: there are {counts}")
        return self

    @property
    def by_length(self) -> bool:
        """Whether the angles of a token depend on how long its document is."""
        return self.kind in ("longrope", "dynamic")

    def magnitude(self, slope: float | None) -> float:
        """YaRN's factor 0.1 m ln(factor) + 1 (equation 22) for slope m, 1 when null."""
        return 1.0 if self.factor <= 1 else 0.1 * (1.0 if slope is None else slope) * math.log(self.factor) + 1.0

    @property
    def rotation_factor(self) -> float:
        """Factor on cosines and sines, so on queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0
        if self.kind != "yarn":
            return 1.0
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(None)


class Rope(Section):
    """Rotary position embedding."""

    theta: PositiveFloat = 10000.0
    """Base of the frequencies."""
    fraction: Fraction = 1.0
    """Share of a head's width that is rotated, from its beginning; the rest carries no position (partial rotary)."""
    interleaved: bool = False
    """Pairs are neighbours (0 and 1, 2 and 3) instead of the two halves of the rotated width."""
    scaling: RopeScaling | None = None
    """Scaling for long contexts; null for none."""

    def width(self, head_width: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_width * self.fraction)
