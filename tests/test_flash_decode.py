"""One position that reads a cache, by kernel: values against `attend`, interpreted on a CPU; bills for absent chips."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepbill.model import architectures, flash_decode
from stepbill.model.attention import Sight, attend
from stepbill.model.cache import Rounded
from stepbill.model.config import Latent
from stepbill.model.quantized import cache_quantize
from stepbill.profiling import closed_form
from test_model_bills import SMALL, assert_sound, bill, expected, needed

# (B, K, G, S, H, V), the position, and what else
CASES = {
    "a full cache": ((1, 2, 4, 256, 32, 32), 255, {}),
    "half of it, three heads a group, wider values": ((2, 2, 3, 200, 32, 64), 100, {}),
    "a window": ((1, 1, 1, 130, 16, 16), 100, {"window": 20}),
    "soft-capped, with sinks": ((1, 2, 4, 200, 32, 32), 100, {"softcap": 3.0, "sinks": True}),
    "a ring that has gone round": ((1, 2, 4, 200, 32, 32), 500, {"ring": True}),
    "a ring that has not": ((1, 2, 4, 200, 32, 32), 50, {"ring": True}),
    "padded on the left": ((2, 2, 4, 200, 32, 32), 199, {"start": (3, 120)}),
    "int8": ((2, 2, 4, 256, 32, 32), 255, {"int8": True}),
}


@cache
def case(name):
    """Queries, keys and values; what the kernel may see of them, and how; and the values by `attend`."""
    (B, K, G, S, H, V), position, options = CASES[name]
    shapes = (B, K, G, 1, H), (B, K, S, H), (B, K, S, V), (K, G)
    random = np.random.default_rng(0)
    q, k, v, logits = (np.float32(random.normal(size=shape)) for shape in shapes)
    if options.get("int8"):
        k, v = (Rounded(*jax.jit(cache_quantize)(one)) for one in (k, v))
    sinks = logits if options.get("sinks") else None
    slots, ring, window = np.arange(S), options.get("ring", False), options.get("window", 0)
    keys = slots if not ring else slots + (position // S - (slots > position % S)) * S
    start = np.asarray(options["start"], np.int32) if "start" in options else None
    how = {"scale": H**-0.5, "softcap": options.get("softcap", 0.0)}

    @jax.jit
    def known(q, k, v, position, sinks):
        sight = Sight(position, jnp.asarray(keys, jnp.int32), window, start, fresh=False, ring=ring)
        return attend((q,), (k,), v, sight, sinks=sinks, **how)

    seen = flash_decode.Seen(np.int32(position), start, window, ring)
    return (q, k, v), seen, how | {"sinks": sinks}, known(q, k, v, np.array([position], np.int32), sinks)


@pytest.fixture(params=[1, 12, 512])
def programs(request, monkeypatch):
    """How many programs share the keys: nothing that was traced for another number is taken for it."""
    monkeypatch.setattr(flash_decode, "PROGRAMS", request.param)
    flash_decode._attend.clear_cache()
    yield
    flash_decode._attend.clear_cache()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("programs")
def test_values_are_those_of_attend(name):
    """However many programs share the keys of a head."""
    arrays, seen, how, expected = case(name)
    found = flash_decode.attend(*arrays, seen, interpret=True, **how)
    (B, K, G, _, _, V), *_ = CASES[name]
    assert found.shape == (B, K, G, 1, V)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_who_has_a_kernel():
    llama = architectures.get("llama3-8b").resolve(training=False)
    assert flash_decode.chosen(llama, "cuda") == "flash"
    latent = Latent(kv_rank=512, rope_width=64, value_width=128)
    for config in (
        replace(llama, attention="xla"),
        replace(llama, layers="scan"),
        replace(llama, head_width=96),
        replace(llama, latent=latent),
        replace(llama, dtype="float64"),
    ):
        assert flash_decode.chosen(config, "cuda") == "xla"
    assert flash_decode.chosen(llama, "tpu") == flash_decode.chosen(llama, "cpu") == "xla"


LLAMA = replace(SMALL, num_heads=8, num_kv_heads=2, head_width=64)
MODELS = {
    "windows, sinks, soft-capped": replace(LLAMA, window=128, global_every=2, sinks=True, attention_softcap=50.0),
    "int8": replace(LLAMA, cache_dtype="int8"),
}


@pytest.mark.parametrize(("name", "tensor"), [("windows, sinks, soft-capped", 1), ("int8", 2), ("int8", 4)])
def test_a_cache_is_read_once_and_every_product_is_billed(name, tensor):
    """Also where more chips share a layer than there are key/value heads: each then reads all of them."""
    config, sizes = MODELS[name], (2, 512)
    found = bill("h200", "decode", {"tensor": tensor}, config=config, sizes=sizes)
    assert_sound(found)
    closed = expected("h200", "decode", config, sizes)
    chips = tensor if config.num_kv_heads % tensor == 0 else 1  # that share heads out
    assert found.component("attention/core").matmul * tensor == closed["attention/core"]
    read, _ = closed_form.cache_bytes(config, "decode", *sizes, 2)
    assert needed(found, "read", "cache") * chips == pytest.approx(read, rel=0.03)
