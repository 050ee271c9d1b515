"""A family of models as data: how its config.json and its tensors correspond to `schema.Model` and our parameters."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.tensors import Row

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}  # hidden_act -> model.activation
# Of the section `model`, what is not the model's function: how it is run, initialised or balanced in training
NOT_FUNCTION = {"layers", "init_scale", "init_from", "ignore_fields"}
NOT_FUNCTION_MOE = {"dispatch", "capacity_factor", "aux_loss", "router_z_loss", "balance_rate"}
NOT_FUNCTION_MTP = {"loss_weight"}


@dataclass(frozen=True)
class Family:
    """Everything about a family; import, export and their checks derive from it."""

    model_type: str
    """What config.json calls it."""
    architecture: str
    """Class of transformers, for the exported config.json."""
    read: Callable[[Fields], schema.Model]
    """The section `model` of a config.json's fields."""
    write: Callable[[schema.Model], dict[str, Any]]
    """The fields of config.json that make the model what it is; for a model of another family, those of the nearest of this one."""
    rows: Callable[[schema.Model], Iterable[Row]]
    """Which tensors hold which parameters."""
    ignored: frozenset[str] = frozenset()
    """Fields without effect on the function, besides those that never have one (`fields.NEVER_MATTERS`)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of which only this value is supported."""
    surplus: tuple[str, ...] = ()
    """Patterns (regular expressions) of tensors in published files that hold no parameters: saved buffers, copies of tied weights."""

    def model(self, config: Mapping[str, Any], place: str = "config.json", removed: Collection[str] = ()) -> schema.Model:
        """The section `model` of a config.json; `place` is what messages call the file, `removed` names fields taken out of it before.

        Raises:
            Refused: a field that is missing, has a value that is not supported, or is not known.
        """
        fields = Fields(config, place)
        try:
            model = self.read(fields)
        except ValidationError as error:
            lines = [f"{place}: model.{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.80})" for e in error.errors()]
            raise Refused("\n".join(lines)) from None
        except Refused:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # values that a reader did not expect
            raise Refused(f"{place}: its fields do not describe a {self.model_type} ({type(error).__name__}: {error})") from None
        fields.finish(self.ignored, self.fixed, removed)
        return model

    def config(self, model: schema.Model) -> dict[str, Any]:
        """The config.json of a model.

        Raises:
            Refused: no config of this family describes this model; the message says what would be lost.
        """
        config = {"architectures": [self.architecture], "model_type": self.model_type, **self.write(model)}
        got, want = function(self.model(config)), function(model)
        lost = [f"{key} = {want.get(key)!r:.100} would be {got.get(key)!r:.100}" for key in want | got if want.get(key) != got.get(key)]
        if lost:
            raise Refused(f"the model is no {self.model_type}: {'; '.join(lost)}")
        return config


def function(model: schema.Model) -> dict[str, Any]:
    """What a model computes, however its layers are grouped and named: equal for models with the same logits."""
    skip = NOT_FUNCTION | {"slots", "prefix", "layer_pattern", "rope", "moe", "mtp", "head_dim"}
    values: dict[str, Any] = {name: getattr(model, name) for name in schema.Model.model_fields if name not in skip}
    values["head_dim"] = model.head_width
    values["norm"] = "rms" if model.norm == "rms_float32" else model.norm  # one rounding apart, and only in bfloat16
    values["mtp"] = model.mtp and {name: getattr(model.mtp, name) for name in schema.Mtp.model_fields if name not in NOT_FUNCTION_MTP}
    values["layers"] = [model.slots[kind].model_copy(update={"rope": model.slots[kind].rope or model.rope}) for kind in model.kinds]
    if all(model.slots[kind].feed_forward == "moe" for kind in model.kinds):
        values.pop("mlp")
    if model.moe is not None:
        values["moe"] = {name: getattr(model.moe, name) for name in schema.Moe.model_fields if name not in NOT_FUNCTION_MOE}
        values["moe"]["balanced"] = model.moe.balance_rate is not None  # whether there is a bias, not how fast it moves
    return values


def free_keys() -> set[str]:
    """The dotted keys of a config that are not the model's function: they may change while it is trained."""
    sections = {"model": NOT_FUNCTION, "model.moe": NOT_FUNCTION_MOE, "model.mtp": NOT_FUNCTION_MTP}
    return {f"{section}.{name}" for section, names in sections.items() for name in names}


def base(fields: Fields, *, eps: float = 1e-6, max_length: int = 2048, tied: bool = False, kv_heads: int | None = None) -> dict[str, Any]:
    """The keys of `schema.Model` that nearly all families read from the same fields, and the family's defaults for absent ones.

    Where the number of key and value heads is null, or absent without a default `kv_heads`, there are as many as query heads.
    """
    heads = fields.need("num_attention_heads", least=1)
    default = heads if "num_key_value_heads" in fields.values else kv_heads or heads
    return {
        "vocab_size": fields.need("vocab_size"),
        "embed": fields.need("hidden_size"),
        "num_layers": fields.num_layers(),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", default),
        "head_dim": fields.optional("head_dim", int),
        "max_length": fields.get("max_position_embeddings", max_length),
        "norm_eps": fields.get("rms_norm_eps", eps),
        "activation": fields.one_of("hidden_act", ACTIVATIONS, "silu"),
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
    }


def base_config(model: schema.Model) -> dict[str, Any]:
    """The inverse of `base`; an activation that `base` does not know becomes `silu`, which `Family.config` refuses as a loss."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": next((name for name, ours in ACTIVATIONS.items() if ours == model.activation), "silu"),
        "tie_word_embeddings": model.tie_embeddings,
    }
