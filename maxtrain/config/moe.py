"""The section `model.moe`: routers, experts and what keeps them balanced, as values."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from maxtrain.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class Moe(Section):
    """Mixture of experts in place of the dense feed-forward."""

    num_experts: PositiveInt
    """Number of routed experts."""
    experts_per_token: PositiveInt
    """How many experts each token is sent to (top-k)."""
    mlp: PositiveInt
    """Hidden width of one expert."""
    routing: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of the experts: `softmax` over all of them (Mixtral, Qwen, GPT-OSS), or a `sigmoid` for each (DeepSeek-V3)."""
    norm_topk: bool = True
    """Divide the weights of the chosen experts by their sum; with `routing: softmax` that is the softmax over the chosen ones."""
    routed_scale: PositiveFloat = 1.0
    """Factor on the weights of the chosen experts (DeepSeek's routed scaling factor)."""
    num_groups: PositiveInt = 1
    """Experts are split into this many groups, and a token chooses groups first (DeepSeek-V2); divides `num_experts`."""
    groups_per_token: PositiveInt = 1
    """How many groups a token chooses; at most `num_groups`."""
    group_score: Literal["max", "top2"] = "max"
    """A group's score: its best expert's (`max`, DeepSeek-V2) or the sum of its two best (`top2`, DeepSeek-V3)."""
    router_bias: bool = False
    """A trained bias on the router's logits (GPT-OSS)."""
    expert_bias: bool = False
    """Trained biases in the experts' three products (GPT-OSS)."""
    shared_mlp: PositiveInt | None = None
    """Hidden width of a shared expert that sees every token (DeepSeek: number of shared experts times `mlp`); null for none."""
    shared_gate: bool = False
    """Multiply the shared expert by a sigmoid gate of the token (Qwen2-MoE)."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """`dropless`: every token reaches its experts. `capacity`: an expert takes a fixed number of a sequence's tokens at most."""
    capacity_factor: PositiveFloat = 1.25
    """Capacity of an expert per sequence, in units of an even split; read by `dispatch: capacity` only."""
    aux_loss: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss, computed per sequence so that neither mesh nor microbatch changes it."""
    router_z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the router's logits (ST-MoE)."""
    balance_rate: NonNegativeFloat | None = None
    """Step of the balancing bias, which takes part in the choice of experts only (DeepSeek-V3); 0 freezes it, null is without one."""

    @model_validator(mode="after")
    def _check(self) -> Moe:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}")
        if "capacity_factor" in self.changed and self.dispatch != "capacity":
            raise ValueError("capacity_factor has no effect with dispatch: dropless; set dispatch: capacity or remove it")
        if self.shared_gate and self.shared_mlp is None:
            raise ValueError("shared_gate has no effect without a shared expert: set shared_mlp or remove it")
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}")
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} is more than num_groups={self.num_groups}")
        if "group_score" in self.changed and self.groups_per_token == self.num_groups:
            raise ValueError("group_score has no effect when every group is chosen: lower groups_per_token or remove it")
        size = self.num_experts // self.num_groups
        if self.group_score == "top2" and size < 2:
            raise ValueError(f"group_score: top2 needs groups of two experts or more: num_groups={self.num_groups} leaves {size}")
        if self.experts_per_token > self.groups_per_token * size:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than the {self.groups_per_token * size} experts of the groups"
            )
