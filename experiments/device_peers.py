"""The same steps by torch on the same GPU, with the same weights: what the device suite's rows are held against.

- `gpt_fast`: a decode step in the manner of pytorch-labs/gpt-fast: a plain module, a static cache, int8 and int4 of
  weights alone, compiled into one CUDA graph.
- `transformers`: Hugging Face's `LlamaForCausalLM` with its static cache, compiled.
- `torch`: prefill and training of the same plain module, with scaled_dot_product_attention, compiled.

A decode step reads a cache that is full but for the position which it writes, and is given no mask, which it then does
not need. Runs in a process of its own, for torch and jax each take the device's memory for themselves.
"""

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from . import device_turns, known_weights
from .device_results import Results
from .device_rows import Row, Work

if TYPE_CHECKING:
    from ..model.config import ModelConfig

REPEATS, SAMPLE_SECONDS, MOST_IN_A_SAMPLE = 10, 0.05, 20  # as experiments/measure.py does it
INNER_TILES = 8  # of torch's packed int4 weights


class Made(NamedTuple):
    """A step, ready: what runs it, what it computed first, as numpy has it, and how it is done, for people."""

    run: Callable[[], Any]
    first: Any
    how: str


def run(row: Row, target: str, results: Results) -> dict[str, Any]:
    """Seconds of the peer's step, and how far what it computes is from what ours does."""
    assert row.work is not None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(results.folder / "inductor"))
    torch.set_float32_matmul_precision("high")
    # What gpt-fast asks of the compiler for decode: it tries tiles of every kernel.
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.coordinate_descent_tuning = row.kind == "gpt_fast"
    device = "cpu" if target == "host" else "cuda"
    # Imported before the turn, not by what first needs them in it.
    if row.kind == "transformers":
        _transformers()
    if device == "cuda":
        importlib.import_module("torch._inductor.compile_fx")
    with results.turn(row, exclusive=True):
        if device == "cuda":
            ours = next(
                (entry["result"] for name in row.of_steps if "result" in (entry := results.entry(name) or {})), {}
            )
            device_turns.wait_for_memory(ours.get("peak_bytes") or 0)
        return _measured(row, row.work, device, results)


def _measured(row: Row, work: Work, device: str, results: Results) -> dict[str, Any]:
    begin = time.perf_counter()
    made = MAKE[row.kind, work.step](work, device)
    ready_seconds = time.perf_counter() - begin

    def seconds(count: int) -> float:
        _wait()
        start = time.perf_counter()
        for _ in range(count):
            made.run()
        _wait()
        return (time.perf_counter() - start) / count

    once = min(seconds(1) for _ in range(3))
    count = max(1, min(MOST_IN_A_SAMPLE, round(SAMPLE_SECONDS / once)))
    timed_from = time.time()
    times = [seconds(count) for _ in range(REPEATS)]
    median = statistics.median(times)
    return {
        "seconds": median,
        "tokens_per_second": work.tokens / median,
        "untraced_seconds": times,
        "timed_between": [timed_from, time.time()],
        "ready_seconds": ready_seconds,
        "how": made.how,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "apart": apart(made.first, results, row),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of what computes here."""
    found: dict[str, str | None] = {}
    for package in ("torch", "transformers", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def apart(theirs: Any, results: Results, row: Row) -> float | None:
    """||theirs - ours|| / ||ours|| of the logits of one sequence, or of the loss; None where ours was not run."""
    import numpy as np

    paths = (results.path("logits", name, ".npy") for name in row.of_steps)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    ours = np.load(path).astype(np.float64)
    return float(np.linalg.norm(np.float64(theirs) - ours) / np.linalg.norm(ours))


# --- weights ---------------------------------------------------------------------------------------------------------


class Full(nn.Module):
    """A product with a weight [outputs, inputs], stored as it is."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return functional.linear(x, self.weight)


class Int8(nn.Module):
    """The same of whole numbers, with a scale for each output."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4(nn.Module):
    """The same by torch's own kernel: packed nibbles, a scale and a zero for each group of inputs of an output."""

    def __init__(self, numbers: Tensor, group: int, scale: float, dtype: torch.dtype):
        super().__init__()
        self.outputs, inputs = numbers.shape
        self.group = group
        nibbles = (numbers + 8).to(torch.uint8)  # the kernel takes 8 off again
        packed = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous()
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(packed, INNER_TILES))
        scales = torch.full((inputs // group, self.outputs), scale, dtype=dtype, device=numbers.device)
        self.scales = nn.Buffer(torch.stack((scales, torch.zeros_like(scales)), -1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm(flat, self.weight, self.group, self.scales)
        return y.reshape(*x.shape[:-1], self.outputs)


class Weights:
    """The known weights of a model, as torch has them: [outputs, inputs]."""

    def __init__(self, config: "ModelConfig", device: str, dtype: torch.dtype):
        if config.tied and config.weights != "full":
            raise ValueError(f"weights is {config.weights!r}; it must be full, for {config.name} is tied")
        self.config, self.device, self.dtype = config, device, dtype
        self.bits = 4 if config.weights.startswith("int4") else 8
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.shapes = {
            **{"attention/wq": (D, N, H), "attention/wk": (D, K, H), "attention/wv": (D, K, H)},
            **{"attention/wo": (N, H, D), "mlp/gate": (D, config.mlp_width), "mlp/up": (D, config.mlp_width)},
            **{"mlp/down": (config.mlp_width, D)},
        }

    def numbers(self, name: str, layer: int) -> Tensor:
        """Of one parameter of a layer, int8."""
        shape = self.shapes[name]
        inputs = math.prod(shape[:2]) if name == "attention/wo" else shape[0]
        found = known_weights.of_torch(f"layers/{name}", layer * math.prod(shape), shape, self.bits, self.device)
        return found.reshape(inputs, -1).T.contiguous()

    def table(self, name: str, *shape: int) -> Tensor:
        """The embedding, int8."""
        return known_weights.of_torch(name, 0, shape, 8, self.device)

    def full(self, numbers: Tensor) -> Tensor:
        """As weights that are not rounded."""
        return numbers.to(self.dtype).mul_(known_weights.SCALES[8])

    def product(self, numbers: Tensor) -> nn.Module:
        """What multiplies with them, as the config stores weights."""
        scale = known_weights.SCALES[self.bits]
        if self.config.weights == "full":
            return Full(self.full(numbers))
        if self.bits == 8:
            return Int8(numbers, torch.full((len(numbers),), scale, dtype=self.dtype, device=self.device))
        return Int4(numbers, int(self.config.weights.partition(":")[2] or 128), scale, self.dtype)

    def layer(self, layer: int, *names: str) -> nn.Module:
        """One product for several parameters of the same inputs."""
        return self.product(torch.cat([self.numbers(name, layer) for name in names]))


# --- the plain module ------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, config: "ModelConfig", weights: Weights):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.width, dtype=weights.dtype, device=weights.device))
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return functional.rms_norm(x.float(), x.shape[-1:], self.scale.float(), self.epsilon).to(x.dtype)


class Block(nn.Module):
    """Attention and a gated MLP; with a cache [B,K,S,H] where it is given one."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: "ModelConfig", weights: Weights, layer: int):
        super().__init__()
        self.config = config
        self.attention_norm, self.mlp_norm = Norm(config, weights), Norm(config, weights)
        self.qkv = weights.layer(layer, "attention/wq", "attention/wk", "attention/wv")
        self.out = weights.layer(layer, "attention/wo")
        self.gate, self.up = weights.layer(layer, "mlp/gate"), weights.layer(layer, "mlp/up")
        self.down = weights.layer(layer, "mlp/down")

    def forward(self, x: Tensor, turns: Tensor, place: Tensor | None) -> Tensor:
        """x [B,T,D]. turns [2,T,H/2]: sine and cosine. place [T]: where in the cache, if there is one."""
        B, T, _ = x.shape
        c = self.config
        sizes = [count * c.head_width for count in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        parts = self.qkv(self.attention_norm(x)).split(sizes, -1)
        q, k, v = (part.view(B, T, -1, c.head_width).transpose(1, 2) for part in parts)
        q, k = turned(q, turns), turned(k, turns)
        if place is not None:
            self.keys.index_copy_(2, place, k)
            self.values.index_copy_(2, place, v)
            if T == 1:
                k, v = self.keys, self.values
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        x = x + self.out(heads.transpose(1, 2).reshape(B, T, -1))
        normed = self.mlp_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE: the pairs (i, i + H/2) of x [B,N,T,H], in float32."""
    first, second = x.float().chunk(2, -1)
    sine, cosine = turns[0], turns[1]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


class Llama(nn.Module):
    """A Llama with the known weights."""

    def __init__(self, config: "ModelConfig", device: str, dtype: torch.dtype):
        super().__init__()
        weights = Weights(config, device, dtype)
        self.config = config
        table = weights.table("embed/table", config.vocabulary, config.width)
        self.table = nn.Parameter(weights.full(table))
        self.blocks = nn.ModuleList(Block(config, weights, layer) for layer in range(config.num_layers))
        self.norm = Norm(config, weights)
        if not config.tied:
            numbers = known_weights.of_torch(
                "unembed", 0, (config.width, config.vocabulary), weights.bits, weights.device
            )
            self.unembed = weights.product(numbers.T.contiguous())
        powers = -torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
        angles = torch.outer(torch.arange(config.max_context).double(), config.rope_theta**powers)
        self.turns = nn.Buffer(torch.stack((angles.sin(), angles.cos())).float().to(device))

    def with_cache(self, batch: int, length: int) -> "Llama":
        """Gives each layer a cache with the known keys and values."""
        c = self.config
        shape = (batch, c.num_kv_heads, length, c.head_width)
        for layer, block in enumerate(self.blocks):
            for name, short in (("keys", "k"), ("values", "v")):
                first = layer * math.prod(shape)
                numbers = known_weights.of_torch(f"cache/{short}", first, shape, 8, str(self.turns.device))
                block.register_buffer(name, numbers.to(self.table.dtype).mul_(known_weights.CACHE_SCALE))
                torch._dynamo.mark_static_address(getattr(block, name))  # else a CUDA graph copies it in and out
        return self

    def forward(self, tokens: Tensor, places: Tensor, cached: bool, last: bool, remat: bool = False) -> Tensor:
        """tokens [B,T] at positions `places` [T] -> float32 logits [B,T,V], or of the last position alone."""
        x = functional.embedding(tokens, self.table)
        turns = self.turns[:, places]
        for block in self.blocks:
            if remat:
                x = checkpoint(block, x, turns, None, use_reentrant=False)
            else:
                x = block(x, turns, places if cached else None)
        x = self.norm(x[:, -1:] if last else x)
        return (functional.linear(x, self.table) if self.config.tied else self.unembed(x)).float()


def _compiled(function: Callable[..., Any], device: str, **options: Any) -> tuple[Callable[..., Any], str]:
    """On a CPU, which only tests use, nothing is compiled."""
    if device == "cpu":
        return function, "eager, on a CPU"
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    return torch.compile(function, **options), f"torch.compile({said})"


def _tokens(work: Work, more: int, device: str) -> Tensor:
    """[B,T + more], T being 1 in decode: the same as ours."""
    shape = (work.batch, (1 if work.step == "decode" else work.context) + more)
    of_ours = shape[:1] if work.step == "decode" else shape
    made = known_weights.tokens_of("tokens", of_ours, work.config().vocabulary)
    return torch.from_numpy(made).long().reshape(shape).to(device)


def gpt_fast(work: Work, device: str) -> Made:
    """One token after a full cache, or (prefill) a prompt into an empty one."""
    with torch.no_grad():
        model = Llama(work.config(), device, torch.bfloat16).with_cache(work.batch, work.context)
    model.requires_grad_(False)
    tokens = _tokens(work, 0, device)
    decode = work.step == "decode"
    places = torch.arange(work.context - 1 if decode else 0, work.context, device=device)
    # A CUDA graph is for steps whose kernels take no longer than launching them.
    options = {"mode": "reduce-overhead"} if decode else {}
    step, how = _compiled(lambda tokens, places: model(tokens, places, True, True), device, fullgraph=True, **options)

    @torch.inference_mode()
    def once() -> Tensor:
        return step(tokens, places)

    first = [once() for _ in range(3)][-1]  # compiles, warms up, records the graph
    return Made(once, first[0, -1].cpu().numpy(), f"own module, {how}, no mask")


def train(work: Work, device: str) -> Made:
    """An update with fused AdamW: weights in float32, computed in bfloat16."""
    model = Llama(work.config(), device, torch.float32)
    decayed = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": decayed[0]}, {"params": decayed[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 3e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    text = _tokens(work, 1, device)
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].reshape(-1)
    places = torch.arange(work.context, device=device)
    remat = work.remat == "full"

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(inputs, places, False, False, remat)
        return functional.cross_entropy(logits.flatten(0, 1), targets)

    compiled, how = _compiled(loss_of, device)

    def once() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = compiled(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    first = float(once())
    once()
    return Made(once, first, f"own module, {how}, sdpa, autocast, remat={work.remat}, fused AdamW")


def hugging_face(work: Work, device: str) -> Made:
    """`LlamaForCausalLM`; the static cache is set back inside of what is compiled."""
    from .bench_peers import llama_config

    transformers = _transformers()
    config, decode = work.config(), work.step == "decode"
    with torch.device(device), torch.no_grad():
        theirs = llama_config(transformers, config.to_json())
        model = transformers.LlamaForCausalLM._from_config(theirs, dtype=torch.bfloat16, attn_implementation="sdpa")
        load(model, Weights(config, device, torch.bfloat16))
    model.eval().requires_grad_(False)
    cache: Any = transformers.StaticCache(config=model.config, max_cache_len=work.context)
    kind = {"dtype": torch.bfloat16, "device": torch.device(device)}
    cache.early_initialization(work.batch, config.num_kv_heads, config.head_width, **kind)
    first_place = work.context - 1 if decode else 0
    for layer, entry in enumerate(cache.layers):
        for tensor, short in ((entry.keys, "k"), (entry.values, "v")):
            numbers = known_weights.of_torch(f"cache/{short}", layer * tensor.numel(), tensor.shape, 8, device)
            tensor.copy_(numbers.to(tensor.dtype).mul_(known_weights.CACHE_SCALE))
    tokens = _tokens(work, 0, device)

    def forward(tokens: Tensor) -> Tensor:
        for entry in cache.layers:
            entry.cumulative_length.fill_(first_place)
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.float()

    step, how = _compiled(forward, device, **({"mode": "reduce-overhead"} if decode else {}))

    @torch.inference_mode()
    def once() -> Tensor:
        return step(tokens)

    first = [once() for _ in range(3)][-1]
    return Made(once, first[0, -1].cpu().numpy(), f"LlamaForCausalLM, StaticCache, sdpa, {how}")


def _transformers() -> Any:
    """The package, with what is used of it, which it else imports late."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    transformers: Any = importlib.import_module("transformers")
    _ = transformers.LlamaForCausalLM, transformers.StaticCache
    return transformers


def load(model: Any, weights: Weights) -> None:
    """Gives a `LlamaForCausalLM` the known weights."""
    config = weights.config
    table = weights.full(weights.table("embed/table", config.vocabulary, config.width))
    model.model.embed_tokens.weight.copy_(table)
    if not config.tied:
        model.lm_head.weight.copy_(weights.full(weights.table("unembed", config.width, config.vocabulary)).T)
    theirs = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    for layer, block in enumerate(model.model.layers):
        for name in weights.shapes:
            room, short = name.split("/")
            module = block.self_attn if room == "attention" else block.mlp
            its = getattr(module, theirs.get(short, f"{short}_proj"))
            its.weight.copy_(weights.full(weights.numbers(name, layer)))


MAKE: dict[tuple[str, str], Callable[[Work, str], Made]] = {
    ("gpt_fast", "decode"): gpt_fast,
    ("torch", "prefill"): gpt_fast,
    ("torch", "train"): train,
    ("transformers", "decode"): hugging_face,
    ("transformers", "prefill"): hugging_face,
}
