"""Training: the loss, its gradient, and AdamW, in one step; by tokens, or after that by preferences or rewards."""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .axes import platform
from .scopes import scope
from .transformer import Params, Transformer

OBJECTIVES = ("tokens", "preference", "policy")


class Rated(NamedTuple):
    """What is known of tokens [B,T] beside themselves, where the objective is not to predict them; each [B,T], float32.

    answer: 1 where a token is of an answer, 0 where it is of a prompt or padding.
    reference: log-probabilities by the model that the new one is to stay near (`score`).
    behaviour, advantage: by the model that wrote the answer, and how much better it was than was to be expected;
      of objective "policy" alone.
    """

    answer: Any
    reference: Any
    behaviour: Any = None
    advantage: Any = None


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Raises ValueError naming the field, its value and what would be right."""

    learning_rate: float = 3e-4  # at its highest
    warmup: int = 0  # updates over which it rises from zero
    steps: int = 0  # updates after which a cosine has brought it down to a tenth; 0: it stays
    weight_decay: float = 0.1  # of matrices
    clip: float = 0.0  # the gradient's global norm is cut to this; 0: it is not
    accumulate: int = 1  # pieces that a batch is cut into, whose gradients are averaged
    # Distillation (Hinton et al., 2015): this much of the loss is the divergence from the teacher's probabilities, both
    # softened by a temperature, and the rest the cross-entropy with the data.
    distill: float = 0.0
    temperature: float = 1.0
    # "tokens": their cross-entropy. "preference": of rows 2i and 2i+1, that the first is preferred (DPO; Rafailov et
    # al., 2023). "policy": that answers of high advantage become likelier, in small steps (clipped as in PPO, Schulman
    # et al., 2017; a mean over each answer, then over answers, and near the reference, as in GRPO, Shao et al., 2024).
    objective: str = "tokens"
    near: float = 0.1  # how much what goes away from the reference counts: beta, in both
    ratio: float = 0.2  # a token's probability gains nothing by changing by more than this share of itself

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        for field, low, high in (
            *(("learning_rate", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("clip", 0.0, math.inf)),
            *(("warmup", 0, math.inf), ("steps", 0, math.inf), ("accumulate", 1, math.inf)),
            *(("distill", 0.0, 1.0), ("temperature", 1e-3, math.inf)),
            *(("near", 0.0, math.inf), ("ratio", 0.0, 1.0)),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                at_most = f" and at most {high:g}" if high < math.inf else ""
                raise ValueError(f"{field} is {value}; it must be at least {low:g}{at_most}")

    @property
    def schedule(self) -> float | optax.Schedule:
        """The learning rate, or what it is at each update."""
        if not self.steps:
            return self.learning_rate
        return optax.warmup_cosine_decay_schedule(
            0.0 if self.warmup else self.learning_rate,
            *(self.learning_rate, self.warmup, max(self.steps, self.warmup + 1), self.learning_rate / 10),
        )


PLAIN = Recipe()


def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats a token, of predicting tokens [B,T+1] each from those before it, with the routers'
    penalties; a float32 scalar."""
    return losses(model, tokens)[0]


def losses(
    model: Transformer,
    tokens: jax.Array,
    teacher: Transformer | None = None,
    recipe: Recipe = PLAIN,
    rated: Rated | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What is minimised, and of it what the data says: the cross-entropy, or the loss of another objective; float32
    scalars. rated: of an objective that is not "tokens"."""
    with scope("loss"):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x, _, penalty = model.hidden(inputs)
    logits = model.logits(x)
    if rated is not None:
        said = log_probabilities(logits, targets)
        rate = preference if recipe.objective == "preference" else policy
        with scope("loss"):
            value = rate(said, rated, recipe)
            return value + penalty, value
    entropy = cross_entropy(logits, targets)
    if teacher is None:
        return entropy + penalty, entropy
    wanted = jax.lax.stop_gradient(teacher(inputs))
    with scope("loss"):
        said, wanted = (jax.nn.log_softmax(x / recipe.temperature) for x in (logits, wanted))
        # Times the square of the temperature, so that its gradient keeps its size.
        divergence = jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - said), axis=-1)) * recipe.temperature**2
        return recipe.distill * divergence + (1 - recipe.distill) * entropy + penalty, entropy


def preference(said: jax.Array, rated: Rated, recipe: Recipe) -> jax.Array:
    """DPO's loss of log-probabilities [B,T], B even: the mean over pairs of -log sigmoid(near x margin). The margin is
    by how much more than the reference the model prefers the first."""
    margin = jnp.sum((said - rated.reference) * rated.answer, axis=-1).reshape(-1, 2)
    return -jnp.mean(jax.nn.log_sigmoid(recipe.near * (margin[:, 0] - margin[:, 1])))


def policy(said: jax.Array, rated: Rated, recipe: Recipe) -> jax.Array:
    """The clipped loss of log-probabilities [B,T], with an unbiased guess of the divergence from the reference."""
    ratio = jnp.exp(said - rated.behaviour)
    kept = jnp.clip(ratio, 1 - recipe.ratio, 1 + recipe.ratio)
    gain = jnp.minimum(ratio * rated.advantage, kept * rated.advantage)
    away = rated.reference - said
    each = (recipe.near * (jnp.exp(away) - away - 1) - gain) * rated.answer
    return jnp.mean(jnp.sum(each, axis=-1) / jnp.maximum(jnp.sum(rated.answer, axis=-1), 1.0))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of logits [B,T,V] with the tokens [B,T] that came: the mean, in nats a token."""
    with scope("loss"):
        return -jnp.mean(log_probabilities(logits, targets))


def log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """By logits [B,T,V], of the tokens [B,T] that came; [B,T], in nats."""
    with scope("loss"):
        return _log_probabilities(logits, targets)


@jax.custom_vjp
def _log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return _forward(logits, targets)[0]


def _said_and_total(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of logits [B,T,V] those of the targets, and the logarithm of the sum of their exponentials; each [B,T]."""
    # A masked sum and not a gather: V may be split over chips.
    said = jnp.where(_is_target(logits, targets), logits, 0.0)
    if platform() != "cuda":
        return jnp.sum(said, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    # There XLA reads the logits, the largest array of all, for each of three sums; and once for one sum of three, whose
    # exponentials are told anew as the maximum grows (Milakov and Gimelshein, 2018).
    zero, lowest = (jnp.array(value, logits.dtype) for value in (0.0, jnp.finfo(logits.dtype).min))
    highest, total, said = jax.lax.reduce(
        (logits, jnp.ones_like(logits), said), (lowest, zero, zero), _merge, dimensions=(2,)
    )
    return said, highest + jnp.log(total)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]


def _merge(one: Any, other: Any) -> Any:
    """Of two parts of the logits: the maximum, the sum of exponentials relative to it, and the targets' logits."""
    (highest_1, total_1, said_1), (highest_2, total_2, said_2) = one, other
    lower = jnp.exp(-jnp.abs(highest_1 - highest_2))
    first = highest_1 >= highest_2
    total = jnp.where(first, total_1, total_2) + lower * jnp.where(first, total_2, total_1)
    return jnp.maximum(highest_1, highest_2), total, said_1 + said_2


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    said, total = _said_and_total(logits, targets)
    return said - total, (logits, targets, total)


def _backward(kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, total = kept
    with scope("loss"):
        probabilities = jnp.exp(logits - total[:, :, None])
        return cotangent[:, :, None] * (_is_target(logits, targets) - probabilities), None


_log_probabilities.defvjp(_forward, _backward)


def score(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Log-probabilities [B,T] of tokens [B,T+1], each after those before it, in nats; float32. It writes no cache."""
    with scope("loss"):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x, _, _ = model.hidden(inputs)
    return log_probabilities(model.logits(x), targets)


def make_optimizer(axes: Params, recipe: Recipe = PLAIN) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) with float32 state, decaying matrices and not norms.

    `axes` is the model's `logical_axes`.
    """

    def is_matrix(letters: str) -> bool:
        # Layers and experts are copies, and the heads of a bias are one axis: "LEF" and "LKH" are of vectors.
        return len(re.sub("[NK]H", "H", letters.lstrip("LE"))) > 1

    matrices = jax.tree.map(is_matrix, axes)
    adamw = optax.adamw(
        recipe.schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=matrices, mu_dtype=jnp.float32
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw) if recipe.clip else adamw


def train_step(
    graph: nnx.GraphDef[Transformer],
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    tokens: jax.Array,
    recipe: Recipe = PLAIN,
    teacher: tuple[nnx.GraphDef[Transformer], Params] | None = None,
    rated: Rated | None = None,
) -> tuple[Params, Any, jax.Array]:
    """One update on tokens [B,T+1]: -> the new parameters, the new optimizer state, and the data's loss before it."""

    def measured(params: Params, tokens: jax.Array, rated: Rated | None) -> tuple[jax.Array, jax.Array]:
        return losses(nnx.merge(graph, params), tokens, nnx.merge(*teacher) if teacher else None, recipe, rated)

    gradient = jax.value_and_grad(measured, has_aux=True)
    if recipe.accumulate == 1:
        (_, entropy), gradients = gradient(params, tokens, rated)
    else:
        pieces = jax.tree.map(lambda x: x.reshape(recipe.accumulate, -1, x.shape[1]), (tokens, rated))

        def add(so_far: tuple[jax.Array, Params], piece: Any) -> tuple[tuple[jax.Array, Params], None]:
            (_, entropy), gradients = gradient(params, *piece)
            with scope("optimizer"):
                return jax.tree.map(lambda a, b: a + b / recipe.accumulate, so_far, (entropy, gradients)), None

        with scope("optimizer"):
            zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), params))
        (entropy, gradients), _ = jax.lax.scan(add, zeros, pieces)
    with scope("optimizer"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return cast(Params, optax.apply_updates(params, updates)), opt_state, entropy
