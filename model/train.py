"""Training: the loss, its gradient, and AdamW, in one step."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .scopes import scope
from .transformer import Params, Transformer


def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats a token, of predicting tokens [B,T+1] each from those before it; a float32 scalar."""
    with scope("loss"):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x, _, penalty = model.hidden(inputs)
    logits = model.logits(x)
    with scope("loss"):
        # A masked sum and not a gather: it fuses into the pass over the logits, and V may be split over chips.
        is_target = jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]
        target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target_logits) + penalty


def make_optimizer(
    axes: Params, learning_rate: float = 3e-4, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) with float32 state, decaying matrices and not norms.

    `axes` is the model's `logical_axes`.
    """
    is_matrix = jax.tree.map(lambda letters: len(letters.removeprefix("L")) > 1, axes)
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=is_matrix, mu_dtype=jnp.float32)


def train_step(
    graph: nnx.GraphDef[Transformer],
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    tokens: jax.Array,
) -> tuple[Params, Any, jax.Array]:
    """One update on tokens [B,T+1]: -> the new parameters, the new optimizer state, and the loss before it."""
    value, gradients = jax.value_and_grad(lambda params: loss(nnx.merge(graph, params), tokens))(params)
    with scope("optimizer"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return cast(Params, optax.apply_updates(params, updates)), opt_state, value
