"""Component names: the one contract between the model, which opens them, and the bill, which reads them back.

Everything the model computes runs inside `scope(name)`, so that XLA carries the name into every instruction.
"""

from contextlib import AbstractContextManager

ENCODERS = ("vision", "audio")  # what an encoder does is named as in a decoder, after one of these
_OF_ENCODERS = (
    "embed",
    "attention/norm",
    "attention/qkv",
    "attention/rope",
    "attention/core",
    "attention/out",
    "mlp/norm",
    "mlp/up",
    "mlp/down",
    "final_norm",
    "merge",
)
COMPONENTS = (
    *(f"{encoder}/{part}" for encoder in ENCODERS for part in _OF_ENCODERS),
    "embed",
    "attention/norm",
    "attention/qkv",
    "attention/rope",
    "attention/cache",
    "attention/core",
    "attention/out",
    "mlp/norm",
    "mlp/up",
    "mlp/down",
    "moe/norm",
    "moe/router",
    "moe/dispatch",
    "moe/experts",
    "moe/shared",
    "moe/combine",
    "final_norm",
    "logits",
    "sampling",
    "loss",
    "optimizer",
)
# What a product with each parameter is part of: some compilers drop the name of a product, never that of an argument.
# The parameter's name, or that of the module it is in and its own.
PRODUCTS = {
    **dict.fromkeys(("wq", "wk", "wv", "wq_down", "wk_down"), "attention/qkv"),
    "wo": "attention/out",
    **dict.fromkeys(("gate", "up"), "mlp/up"),
    "down": "mlp/down",
    "router": "moe/router",
    **dict.fromkeys(("moe/gate", "moe/up", "moe/down"), "moe/experts"),
    **dict.fromkeys(("shared/gate", "shared/up", "shared/down"), "moe/shared"),
    "unembed": "logits",
}
_OF_ENCODER = {
    **dict.fromkeys(("merge/up", "merge/down"), "merge"),
    **dict.fromkeys(("patch", "near", "far"), "embed"),
    **{name: part for name, part in PRODUCTS.items() if part in _OF_ENCODERS},
}
PRODUCTS |= {f"{encoder}/{name}": f"{encoder}/{part}" for encoder in ENCODERS for name, part in _OF_ENCODER.items()}


def is_component(name: str) -> bool:
    """Whether `name` is a whole component path of the list, or lies under an encoder's prefix."""
    return name in COMPONENTS or name.startswith(tuple(prefix + "/" for prefix in ENCODERS))


def scope(name: str) -> AbstractContextManager[object]:
    """`jax.named_scope(name)` for a known component; raises ValueError for any other name."""
    if not is_component(name) and name not in ENCODERS:  # which alone stands around the scopes of a block
        raise ValueError(
            f"scope is {name!r}; it must be one of {', '.join(COMPONENTS)}, or start with vision/ or audio/"
        )
    import jax  # here, because profiling reads COMPONENTS without needing jax

    return jax.named_scope(name)
