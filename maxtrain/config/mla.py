"""The section `model.mla`: multi-head latent attention as values."""

from __future__ import annotations

from maxtrain.config.section import PositiveFloat, PositiveInt, Section


class Mla(Section):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) in place of grouped-query attention.

    Keys and values of all heads are products of one latent vector per token; the position is in a part of the key that all heads share.
    """

    q_rank: PositiveInt | None = None
    """Width of the latent vector that queries are made from; null makes them from the residual stream (DeepSeek-V2-Lite)."""
    kv_rank: PositiveInt = 512
    """Width of the latent vector that keys and values are made from; serving keeps it instead of them."""
    nope_dim: PositiveInt = 128
    """Width of the part of a head's query and key without position."""
    rope_dim: PositiveInt = 64
    """Width of the rotated part; its key is shared by all heads."""
    value_dim: PositiveInt = 128
    """Width of a head's value."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of the latent vectors' norms."""

    @property
    def cached(self) -> int:
        """Elements a token leaves in the cache of a layer: latent vector and rotated key."""
        return self.kv_rank + self.rope_dim
