"""Kind prototype_head, and native names of prototype heads (they are ours)."""

from typing import Any

from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead

from .compare import Comparison, Declined, refuse_unknown
from .io import Case

# Native keyword arguments with their defaults; the two sizes have none.
SIZES = ("in_dim", "out_dim")
DEFAULTS = {"use_bn": False, "nlayers": 3, "hidden_dim": 2048, "bottleneck_dim": 256, "mlp_bias": True}


def build_head(native: dict[str, Any]) -> PrototypeHead:
    """The head for native keyword arguments.

    Raises:
        Declined: batch norm.
        Unknown: an argument that the original does not have.
    """
    refuse_unknown("constructor", native, (*SIZES, *DEFAULTS))
    options = DEFAULTS | native
    if options["use_bn"]:
        raise Declined("batch norm in the prototype head (use_bn)")
    return PrototypeHead(
        options["in_dim"],
        num_prototypes=options["out_dim"],
        bottleneck_dim=options["bottleneck_dim"],
        hidden_dim=options["hidden_dim"],
        num_layers=options["nlayers"],
        mlp_bias=options["mlp_bias"],
    )


def check_prototype_head(case: Case, compare: Comparison) -> None:
    """Logits, bottleneck and prototypes alone, and the gradients of sum(logits * cotangent)."""
    head = build_head(case.constructor)
    head.load_state_dict(case.weights)
    head.train(case.config.get("train_mode", True))
    x = case.inputs["x"].clone().requires_grad_()
    logits = head(x)
    (logits * case.inputs["cotangent"]).sum().backward()
    compare.check("logits", logits)
    compare.check("no_last_layer", head.bottleneck(x))
    compare.check("only_last_layer", head.last_layer(case.inputs["bottleneck"]))
    compare.check("grad_x", x.grad)
    for name, parameter in head.named_parameters():
        compare.check(f"grad/{name}", parameter.grad)
