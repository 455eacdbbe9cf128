"""A tiny transformer language model in each of the styles that JAX programs are written in, none with our scopes.

Each function gives (step, its abstract arguments, which are donated). All but `decode` train: loss, gradient, update.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from compiled import f32, i32
from flax import nnx
from jax import lax

B, T, S, D, N, H, F, V = 2, 16, 64, 32, 4, 8, 96, 160
RATE = 1e-2


class Program(NamedTuple):
    """A step, its arguments, which of them are donated, its layers, and how many ways up an mlp has."""

    step: Any
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    layers: int = 1
    ups: int = 1


def matmul_flops(program: Program, queries: int = T, keys: int = T, passes: int = 3) -> dict[str, int]:
    """By component; training makes two more passes than forward, each of the same products."""
    rows = passes * program.layers * 2 * B * queries
    return {
        "attention/qkv": rows * D * 3 * N * H,
        "attention/core": rows * 2 * N * H * keys,
        "attention/out": rows * N * H * D,
        "mlp/up": rows * D * F * program.ups,
        "mlp/down": rows * F * D,
        "logits": passes * 2 * B * queries * D * V,
    }


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def descend(loss, params, *inputs):
    """(new parameters, loss): gradient descent."""
    value, gradients = jax.value_and_grad(loss)(params, *inputs)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value


# --- Flax Linen: every module is a scope, numbered by class ----------------------------------------------------------


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(nn.gelu(nn.Dense(F)(x)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=N)(nn.LayerNorm()(x), mask=mask)
        return x + LinenMlp()(nn.LayerNorm()(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = LinenBlock()(nn.Embed(V, D, name="wte")(tokens))
        return nn.Dense(V, use_bias=False, name="lm_head")(nn.LayerNorm(name="ln_f")(x))


def linen() -> Program:
    """With Adam, whose state has the shapes of the parameters."""
    model, adam = LinenModel(), optax.adam(RATE)
    params = jax.eval_shape(model.init, jax.random.key(0), i32(B, T))
    state = jax.eval_shape(adam.init, params)

    def step(params, opt_state, tokens):
        value, gradients = jax.value_and_grad(lambda p: cross_entropy(model.apply(p, tokens), tokens))(params)
        updates, opt_state = adam.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    return Program(step, (params, state, i32(B, T)), (0, 1))


# --- Flax NNX: no scopes; the state says where each array is from ----------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(N, D, decode=False, rngs=rngs)
        self.gate_proj, self.up_proj, self.down_proj = linear(D, F), linear(D, F), linear(F, D)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x), mask=nnx.make_causal_mask(jnp.zeros(x.shape[:2])))
        h = self.norm2(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h))


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed_tokens = nnx.Embed(V, D, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.lm_head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def nnx_split() -> Program:
    """As jax.jit takes it: the state by name."""
    graph, state = nnx.split(nnx.eval_shape(NnxModel))

    def loss(state, tokens):
        return cross_entropy(nnx.merge(graph, state)(tokens), tokens)

    return Program(partial(descend, loss), (state, i32(B, T)), (0,), ups=2)


def numbered() -> Program:
    """The same, its arguments in a list as nnx.jit hands them on: nothing has a name."""
    graph, state = nnx.split(nnx.eval_shape(NnxModel))
    leaves, form = jax.tree.flatten(state)

    def loss(leaves, tokens):
        return cross_entropy(nnx.merge(graph, jax.tree.unflatten(form, leaves))(tokens), tokens)

    return Program(partial(descend, loss), (leaves, i32(B, T)), (0,), ups=2)


# --- Haiku: every module is a scope, numbered from the second on -----------------------------------------------------


class HaikuBlock(hk.Module):
    def __call__(self, x):
        norm = partial(hk.LayerNorm, -1, True, True)
        h = norm()(x)
        attend = hk.MultiHeadAttention(N, H, w_init=hk.initializers.VarianceScaling(), model_size=D)
        x = x + attend(h, h, h, mask=jnp.tril(jnp.ones((1, 1, T, T))))
        return x + hk.nets.MLP([F, D], activation=jax.nn.gelu)(norm()(x))


def haiku() -> Program:
    def forward(tokens):
        x = HaikuBlock(name="block")(hk.Embed(V, D)(tokens))
        return hk.Linear(V, with_bias=False, name="unembed")(hk.LayerNorm(-1, True, True)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(model.init, jax.random.key(0), i32(B, T))

    def loss(params, tokens):
        return cross_entropy(model.apply(params, tokens), tokens)

    return Program(partial(descend, loss), (params, i32(B, T)), (0,))


# --- Equinox: a scope for the class of each of its own layers; the model is an argument with attributes --------------


class EquinoxBlock(eqx.Module):
    ln1: eqx.nn.LayerNorm
    ln2: eqx.nn.LayerNorm
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.ln1, self.ln2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.attn = eqx.nn.MultiheadAttention(N, D, key=key)
        self.mlp = eqx.nn.MLP(D, D, F, 1, activation=jax.nn.gelu, key=key)

    def __call__(self, x):
        h = jax.vmap(self.ln1)(x)
        x = x + self.attn(h, h, h, mask=jnp.tril(jnp.ones((T, T), bool)))
        return x + jax.vmap(lambda row: self.mlp(self.ln2(row)))(x)


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[EquinoxBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embedding, self.norm = eqx.nn.Embedding(V, D, key=key), eqx.nn.LayerNorm(D)
        self.blocks = [EquinoxBlock(key)]
        self.head = eqx.nn.Linear(D, V, use_bias=False, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(lambda row: self.head(self.norm(row)))(x)


def equinox() -> Program:
    model = eqx.filter_eval_shape(EquinoxModel, jax.random.key(0))
    arrays, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))

    def loss(model, tokens):
        return cross_entropy(jax.vmap(eqx.combine(model, static))(tokens), tokens)

    return Program(partial(descend, loss), (arrays, i32(B, T)), (0,))


# --- Haliax: a scope for the class of each module, the same for all products; arguments with attributes --------------


class Classes(NamedTuple):
    wte: Any
    layers: list[dict[str, Any]]
    ln_f: Any
    lm_head: Any


def classes() -> Program:
    def linear(equation, x, w):
        with jax.named_scope("Linear"):
            return jnp.einsum(equation, x, w)

    def block(x, p):
        with jax.named_scope("Attention"):
            h = rms(x, p["ln1"])
            q, k, v = (linear("btd,dnh->btnh", h, p["self_attn"][name]) for name in ("q_proj", "k_proj", "v_proj"))
            s = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), jnp.einsum("btnh,bsnh->bnts", q, k), -1e9)
            o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s), v + p["self_attn"]["v_bias"][None, None])
            x = x + linear("btnh,nhd->btd", o, p["self_attn"]["o_proj"])
        with jax.named_scope("LlamaMlp"):
            h = rms(x, p["ln2"])
            return x + linear("btf,fd->btd", jax.nn.gelu(linear("btd,df->btf", h, p["mlp"]["up"])), p["mlp"]["down"])

    def loss(model, tokens):
        x = block(model.wte[tokens], model.layers[0])
        return cross_entropy(linear("btd,dv->btv", rms(x, model.ln_f), model.lm_head), tokens)

    attention = {name: f32(D, N, H) for name in ("q_proj", "k_proj", "v_proj")}
    attention |= {"v_bias": f32(N, H), "o_proj": f32(N, H, D)}
    layer = {"ln1": f32(D), "self_attn": attention, "ln2": f32(D), "mlp": {"up": f32(D, F), "down": f32(F, D)}}
    model = Classes(f32(V, D), [layer], f32(D), f32(D, V))
    return Program(partial(descend, loss), (model, i32(B, T)), (0,))


# --- plain functions of arrays ---------------------------------------------------------------------------------------


def rms(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * jnp.broadcast_to(scale, x.shape)


def plain_params(layers):
    layer = {"ln1": f32(D), "wq": f32(D, N, H), "wk": f32(D, N, H), "wv": f32(D, N, H), "wo": f32(N, H, D)}
    layer |= {"ln2": f32(D), "w1": f32(D, F), "w2": f32(F, D)}
    return {"wte": f32(V, D), "layers": [dict(layer) for _ in range(layers)], "ln_f": f32(D), "lm_head": f32(D, V)}


def plain_mlp(x, p):
    return x + jax.nn.gelu(rms(x, p["ln2"]) @ p["w1"]) @ p["w2"]


def plain_layer(x, p):
    h = rms(x, p["ln1"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, p[name]) for name in ("wq", "wk", "wv"))
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
    s = jnp.where(jnp.tril(jnp.ones((1, 1, T, T), bool)), s, -1e9)
    o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s), v)
    return plain_mlp(x + jnp.einsum("btnh,nhd->btd", o, p["wo"]), p)


def plain() -> Program:
    """Two layers, one after the other."""

    def loss(p, tokens):
        x = p["wte"][tokens]
        for layer in p["layers"]:
            x = plain_layer(x, layer)
        return cross_entropy(rms(x, p["ln_f"]) @ p["lm_head"], tokens)

    return Program(partial(descend, loss), (plain_params(2), i32(B, T)), (0,), layers=2)


def scanned() -> Program:
    """Two layers, their weights stacked, in a loop that computes them again on the way back."""
    params = plain_params(1)
    stack = {name: f32(2, *weight.shape) for name, weight in params["layers"][0].items()}

    def loss(p, tokens):
        body = jax.checkpoint(lambda x, layer: (plain_layer(x, layer), None))
        x, _ = lax.scan(body, p["wte"][tokens], p["layers"])
        return cross_entropy(rms(x, p["ln_f"]) @ p["lm_head"], tokens)

    return Program(partial(descend, loss), (params | {"layers": stack}, i32(B, T)), (0,), layers=2)


def decode() -> Program:
    """One token, with a cache."""

    def step(p, kv, token, position):
        x, written = p["wte"][token], []
        for layer, (k, v) in zip(p["layers"], kv, strict=True):
            h = rms(x, layer["ln1"])
            q, new_k, new_v = (jnp.einsum("bd,dnh->bnh", h, layer[name]) for name in ("wq", "wk", "wv"))
            k = lax.dynamic_update_slice(k, new_k[:, :, None], (0, 0, position, 0))
            v = lax.dynamic_update_slice(v, new_v[:, :, None], (0, 0, position, 0))
            written.append((k, v))
            s = jnp.einsum("bnh,bnsh->bns", q, k) / math.sqrt(H)
            s = jnp.where((jnp.arange(S) <= position)[None, None], s, -1e9)
            o = jnp.einsum("bns,bnsh->bnh", jax.nn.softmax(s), v)
            x = plain_mlp(x + jnp.einsum("bnh,nhd->bd", o, layer["wo"]), layer)
        return rms(x, p["ln_f"]) @ p["lm_head"], written

    kv = [(f32(B, N, S, H), f32(B, N, S, H))]
    return Program(step, (plain_params(1), kv, i32(B), i32()), (1,))


STYLES = {
    style.__name__: style for style in (linen, nnx_split, numbered, haiku, equinox, classes, plain, scanned, decode)
}


# --- programs without a transformer in them --------------------------------------------------------------------------


def regression() -> Program:
    """An mlp of unequal ends, with a softmax in its loss."""

    def loss(layers, x, y):
        for w, b in layers[:-1]:
            x = jax.nn.relu(x @ w + b[None])
        return optax.softmax_cross_entropy(x @ layers[-1][0], y).mean()

    layers = [(f32(24, 48), f32(48)), (f32(48, 40), f32(40)), (f32(40, 10), f32(10))]
    return Program(partial(descend, loss), (layers, f32(8, 24), f32(8, 10)), (0,))


def convolutions() -> Program:
    """Convolutions with norms, pooled."""

    def loss(filters, image):
        for kernel in filters:
            image = jax.nn.relu(lax.conv(image, kernel, (1, 1), "SAME"))
            image = image - image.mean((2, 3), keepdims=True)
        return jax.nn.logsumexp(image.mean((2, 3)), axis=-1).sum()

    return Program(partial(descend, loss), ([f32(8, 3, 3, 3), f32(8, 8, 3, 3)], f32(2, 3, 16, 16)), (0,))


def spectrum() -> Program:
    return Program(lambda x: jnp.abs(jnp.fft.fft(x)) ** 2 / x.shape[-1], (f32(4, 64),), ())


def contrast() -> Program:
    """Two towers whose products with each other go through a softmax, in the loss."""

    def loss(towers, a, b):
        u, v = a @ towers[0], b @ towers[1]
        return optax.softmax_cross_entropy_with_integer_labels(u @ v.T, jnp.arange(16)).mean()

    return Program(partial(descend, loss), ([f32(24, 32), f32(40, 32)], f32(16, 24), f32(16, 40)), (0,))


NO_TRANSFORMERS = {make.__name__: make for make in (regression, convolutions, spectrum, contrast)}
