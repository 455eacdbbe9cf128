"""Why the decode step is built as it is: the same step in five forms, each with its own bill.

    python -m stepbill.experiments.decode_choices --target=h200

Plain JAX of one Llama-3-8B-wide stack (4 layers, no embedding), written so that one choice differs at a time. Prints
HBM bytes against the least that is possible, and the taxes that make the difference. BUILD_NOTES.md has the results.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from ..profiling import chips, targets

TARGET = flags.DEFINE_enum("target", "h200", [name for name in chips.CHIPS if name != "host"], "chip to compile for")
BATCH = flags.DEFINE_integer("batch", 8, "sequences", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 4096, "positions of the cache", lower_bound=1)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "how to print")

L, D, N, K, H, F = 4, 4096, 32, 8, 128, 14336
WEIGHTS = {
    "wq": (D, N, H),
    "wk": (D, K, H),
    "wv": (D, K, H),
    "wo": (N, H, D),
    "gate": (D, F),
    "up": (D, F),
    "down": (F, D),
}
CHOICES = {
    "unrolled, cache [B,K,S,H] donated": {},
    "cache [B,S,K,H], dot_product_attention": {"layout": "BSKH"},
    "weights stacked and scanned": {"layers": "scan"},
    "cache as scan xs -> ys": {"layers": "scan", "cache": "xs_ys"},
    "cache not donated": {"donate": False},
}


def _block(w: dict[str, Any], x: Any, k: Any, v: Any, position: Any, layout: str) -> tuple[Any, Any, Any]:
    """One layer for one new token: x [B,D]; k, v [B,K,S,H] or [B,S,K,H] by layout."""
    import jax
    import jax.numpy as jnp

    from ..model.scopes import scope

    B = x.shape[0]
    with scope("attention/qkv"):
        q, new_k, new_v = (jnp.einsum("bd,dnh->bnh", x, w[name]) for name in ("wq", "wk", "wv"))
    axis = layout.index("S")
    with scope("attention/cache"):
        start = [0, 0, 0, 0]
        start[axis] = position
        k = jax.lax.dynamic_update_slice(k, jnp.expand_dims(new_k, axis), start)
        v = jax.lax.dynamic_update_slice(v, jnp.expand_dims(new_v, axis), start)
    with scope("attention/core"):
        seen = jnp.arange(k.shape[axis]) <= position
        if layout == "BSKH":
            heads = jax.nn.dot_product_attention(q[:, None], k, v, mask=seen[None, None, None, :])
        else:
            grouped = q.reshape(B, K, N // K, H)
            scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(x.dtype)
            heads = jnp.einsum("bkgs,bksh->bkgh", weights, v)
    with scope("attention/out"):
        x = x + jnp.einsum("bnh,nhd->bd", heads.reshape(B, N, H), w["wo"])
    with scope("mlp/up"):
        hidden = jax.nn.silu(x @ w["gate"]) * (x @ w["up"])
    with scope("mlp/down"):
        return x + hidden @ w["down"], k, v


def _program(
    layout: str = "BKSH", layers: str = "unroll", cache: str = "carry", donate: bool = True
) -> tuple[Callable, Any]:
    """The jitted step of one choice, and its abstract arguments (params, cache, x, position)."""
    import jax
    import jax.numpy as jnp

    def unrolled(params: Any, cache: Any, x: Any, position: Any) -> Any:
        out = []
        for w, (k, v) in zip(params, cache, strict=True):
            x, k, v = _block(w, x, k, v, position, layout)
            out.append((k, v))
        return x, out

    def carried(params: Any, cache: Any, x: Any, position: Any) -> Any:
        def body(carry: Any, layer: Any) -> Any:
            x, ks, vs = carry
            w, n = layer
            x, k, v = _block(w, x, ks[n], vs[n], position, layout)
            return (x, ks.at[n].set(k), vs.at[n].set(v)), None

        (x, ks, vs), _ = jax.lax.scan(body, (x, *cache), (params, jnp.arange(L)))
        return x, (ks, vs)

    def scanned(params: Any, cache: Any, x: Any, position: Any) -> Any:
        def body(x: Any, layer: Any) -> Any:
            w, k, v = layer
            x, k, v = _block(w, x, k, v, position, layout)
            return x, (k, v)

        return jax.lax.scan(body, x, (params, *cache))

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    sizes = {"B": BATCH.value, "K": K, "S": CONTEXT.value, "H": H}
    one = tuple(sizes[letter] for letter in layout)
    if layers == "scan":
        params: Any = {name: array(L, *shape) for name, shape in WEIGHTS.items()}
        cache_arrays: Any = (array(L, *one), array(L, *one))
        function = carried if cache == "carry" else scanned
    else:
        params = [{name: array(*shape) for name, shape in WEIGHTS.items()} for _ in range(L)]
        cache_arrays = [(array(*one), array(*one)) for _ in range(L)]
        function = unrolled
    position = jax.ShapeDtypeStruct((), jnp.int32)
    jitted = jax.jit(function, donate_argnums=(1,) if donate else ())
    return jitted, (params, cache_arrays, array(BATCH.value, D), position)


def compare() -> list[dict[str, Any]]:
    """One entry a choice: HBM bytes, the least possible, their ratio, and the bytes of each tax."""
    from ..profiling import itemize

    # The least: every weight once, the cache once, one new position.
    cache = 2 * L * BATCH.value * K * H * 2
    least = 2 * L * sum(_elements(shape) for shape in WEIGHTS.values()) + cache * CONTEXT.value + cache
    results = []
    for name, choice in CHOICES.items():
        program, arguments = _program(**choice)
        roles = {"params": "weights", "cache": "cache", "x": "inputs", "position": "inputs"}
        bill = itemize(program, *arguments, target=TARGET.value, roles=roles)
        taxes = {tax: bill.tax(tax).hbm_bytes for tax in ("layout", "slice", "convert", "padding")}
        results.append({"choice": name, "hbm_bytes": bill.total.hbm_bytes, "least_bytes": least, "taxes": taxes})
    return results


def _elements(shape: tuple[int, ...]) -> int:
    elements = 1
    for size in shape:
        elements *= size
    return elements


def main(argv: Sequence[str]) -> None:
    del argv
    targets.prepare(TARGET.value)
    results = compare()
    if FORMAT.value == "json":
        print(json.dumps({"target": TARGET.value, "batch": BATCH.value, "context": CONTEXT.value, "results": results}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{L} layers of Llama-3-8B width, batch {BATCH.value}, context {CONTEXT.value}, {TARGET.value}")
    for column in ("choice", "HBM GB", "total/ideal", "layout GB", "slice GB", "convert GB"):
        table.add_column(column, justify="left" if column == "choice" else "right", no_wrap=True)
    for entry in results:
        taxes = [f"{entry['taxes'][tax] / 1e9:.3f}" for tax in ("layout", "slice", "convert")]
        ratio = f"{entry['hbm_bytes'] / entry['least_bytes']:.3f}"
        table.add_row(entry["choice"], f"{entry['hbm_bytes'] / 1e9:.3f}", ratio, *taxes)
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
