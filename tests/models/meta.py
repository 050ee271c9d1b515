"""Names and shapes of tensors: of transformers' models on torch's meta device, and of our tables."""

from maxtrain.checkpoint import weights
from maxtrain.models import families


def their_tensors(config, model):
    """Name and shape of the tensors of transformers' model, and of its modules of multi-token prediction."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    found = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if model.tie_embeddings:
        found.pop("lm_head.weight", None)
    return found, predictors(theirs, model) if model.mtp else {}


def our_tensors(family, model, found):
    """Name and shape of the tensors that the family's table writes, in the form of which most is found."""
    shapes, expected = weights.parameter_shapes(model), {}
    for row in family.rows(model):
        expected |= row.shapes(families.choose(row, found), shapes)
    return expected


def predictors(theirs, model):
    """Name and shape, in the published form, of the modules of multi-token prediction, which transformers loads apart."""
    import torch
    from transformers.modeling_layers import MtpModel

    if getattr(theirs.config, "num_mtp_layers", None) is None:  # not there yet (GLM-4.7-Flash): a layer like the last, and what joins
        last, joins = f"model.layers.{model.num_layers - 1}.", ("enorm", "hnorm", "shared_head.norm")
        layer = {name.removeprefix(last): tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name.startswith(last)}
        layer |= {f"{name}.weight": (model.embed,) for name in joins} | {"eh_proj.weight": (model.embed, 2 * model.embed)}
        found = {f"{depth}.{name}": shape for depth in range(model.mtp.num_layers) for name, shape in layer.items()}
    else:
        with torch.device("meta"):
            modules = MtpModel(theirs, model.mtp.num_layers)
        found = {}
        for name, tensor in modules.state_dict().items():
            if name.startswith("layers."):
                _, depth, rest = name.split(".", 2)
                rest = {"post_norm.weight": "shared_head.norm.weight"}.get(rest, rest.removeprefix("mtp_block."))
                found[f"{depth}.{rest}"] = tuple(tensor.shape)
    for depth in range(model.mtp.num_layers):
        found |= {f"{depth}.{name}.weight": (model.vocab_size, model.embed) for name in ("embed_tokens", "shared_head.head")}
    depths = ((name.split(".", 1), shape) for name, shape in found.items())
    return {f"model.layers.{model.num_layers + int(depth)}.{rest}": shape for (depth, rest), shape in depths}
