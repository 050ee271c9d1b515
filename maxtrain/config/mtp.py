"""The section `model.mtp`: multi-token prediction as values."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from maxtrain.config.section import NonNegativeFloat, Section


class Mtp(Section):
    """Layers behind the last that predict further tokens (DeepSeek-V3, section 2.2): a training signal, and drafts when serving.

    Module k joins the hidden state that module k - 1 made at a position with the embedding of the token k further on, and predicts the
    one after that. Each is a layer of the last kind; embedding and head are the model's.
    """

    num_layers: Annotated[int, Field(ge=1, le=100)] = 1
    """How many modules there are: how many tokens beyond the next are predicted."""
    loss_weight: NonNegativeFloat = 0.3
    """Factor on the mean of the modules' losses in training (section 4.2: 0.3, in the end 0.1)."""
