"""Models on disk: Hugging Face checkpoints in, our own format both ways. Safetensors only, never pickle.

A folder of ours has `model.json`, the config, and `model.safetensors`, a tensor a parameter, named by its path in the
unrolled model; int4 is packed two in a byte. Tensors are read one by one, and quantised as they come where that is
asked for, so that no more than one of them is ever held in full.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import hugging_face, quantized
from .config import ModelConfig
from .transformer import Params, Transformer, contracted_axes, logical_axes, split

CONFIG, TENSORS = "model.json", "model.safetensors"
_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_},
}


class Tensors:
    """The tensors of a folder, in one file or in several that an index lists; read when asked for.

    ValueError naming the file where one is missing, is cut off or is no safetensors.
    """

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError):
                raise ValueError(f"{index}: no index of safetensors files") from None
        else:
            files = {TENSORS}
        self.folder = folder
        self._where: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for file in sorted(files):
            self._read_header(folder / file)

    def _read_header(self, path: Path) -> None:
        """A safetensors file: the header's length in 8 bytes, the header in JSON, then the tensors as they lie."""
        try:
            with path.open("rb") as file:
                start = int.from_bytes(file.read(8), "little") + 8
                size = path.stat().st_size
                if not 8 < start <= size:
                    raise ValueError(f"{path}: cut off, or no safetensors file: its header ends at {start} of {size}")
                header = json.loads(file.read(start - 8))
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: no safetensors file: its header is no text") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: no safetensors file: its header is no JSON ({error})") from None
        for name, about in header.items():
            if name == "__metadata__":
                continue
            first, last = about["data_offsets"]
            if start + last > size:
                raise ValueError(f"{path}: cut off: {name} ends at byte {start + last} of {size}")
            if last - first != _nbytes(about):
                raise ValueError(
                    f"{path}: {name} has {last - first} bytes; its shape and type ask for {_nbytes(about)}"
                )
            self._where[name] = (path, about, start)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped; ValueError if there is none of that name."""
        if name not in self._where:
            raise ValueError(f"{self.folder}: there is no tensor {name}")
        path, about, start = self._where[name]
        shape, offset = tuple(about["shape"]), start + about["data_offsets"][0]
        dtype = np.dtype(_DTYPES[about["dtype"]])
        if not shape or 0 in shape:
            return np.zeros(shape, dtype) if 0 in shape else np.fromfile(path, dtype, 1, offset=offset).reshape(())
        return np.memmap(path, np.uint8, "r", offset, (_nbytes(about),)).view(dtype).reshape(shape)


def _nbytes(about: dict[str, Any]) -> int:
    if about["dtype"] not in _DTYPES:
        raise ValueError(f"a tensor has type {about['dtype']}; it must be one of {', '.join(_DTYPES)}")
    return int(np.prod(about["shape"], dtype=np.int64)) * np.dtype(_DTYPES[about["dtype"]]).itemsize


def read(
    folder: Path | str,
    *,
    dtype: str | None = None,
    weights: str | None = None,
    **changes: Any,
) -> tuple[ModelConfig, Params]:
    """A checkpoint of ours or of Hugging Face -> its config and its parameters.

    Args:
      dtype: of what is computed, and of weights that are not quantised; by default as the files have them.
      weights: quantises those that are not, as config.weights says it.
      changes: other fields of the config, such as layers="scan".
    Raises ValueError naming the file, the tensor and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    ours = (folder / CONFIG).exists()
    if ours:
        try:
            stored = ModelConfig.from_json(json.loads((folder / CONFIG).read_text()))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
    else:
        stored = hugging_face.read_config(folder)
    if weights is not None and stored.weights not in ("full", weights):
        raise ValueError(f"weights is {weights}; {folder} is quantised already, to {stored.weights}")
    tensors = Tensors(folder)
    kind = dtype or _stored_dtype(tensors)
    plain = replace(stored, **({"dtype": kind, "param_dtype": kind} | changes))
    config = replace(plain, weights=weights or stored.weights)
    take = _ours(plain, tensors) if ours else _theirs(plain, tensors, folder)
    return config, _filled(config, plain, take)


def _stored_dtype(tensors: Tensors) -> str:
    kinds = {tensors[name].dtype.name for name in tensors.names[:64]}
    return next((kind for kind in ("bfloat16", "float16", "float32") if kind in kinds), "float32")


Take = Callable[[str, str, tuple[int, ...]], np.ndarray]  # path, letters, shape -> a parameter of the unrolled model


def _ours(config: ModelConfig, tensors: Tensors) -> Take:
    int4 = {path for path in tensors.names if path.endswith(":int4")}

    def take(path: str, axes: str, shape: tuple[int, ...]) -> np.ndarray:
        del axes
        if path + ":int4" in int4:
            return _unpacked(tensors[path + ":int4"], shape)
        array = tensors[path]
        if array.shape != shape:
            raise ValueError(f"{tensors.folder}: {path} has shape {list(array.shape)}; it must be {list(shape)}")
        return array

    del config
    return take


def _theirs(config: ModelConfig, tensors: Tensors, folder: Path) -> Take:
    found = json.loads((folder / "config.json").read_text())
    family = found["model_type"].replace("gemma3", "gemma3_text").replace("text_text", "text")
    table = hugging_face.tensors(config, family)
    first = "wte.weight" if family == "gpt2" else "embed_tokens.weight"
    prefix = next((name.removesuffix(first) for name in tensors.names if name.endswith(first)), "")
    blocks = "h" if family == "gpt2" else "layers"

    def take(path: str, axes: str, shape: tuple[int, ...]) -> np.ndarray:
        layer, ours = "", path.replace("/", ".")
        if ours.startswith("layers."):
            _, number, ours = ours.split(".", 2)
            layer = f"{blocks}.{number}."
        tensor = table[ours]
        name = (prefix if tensor.name != "lm_head.weight" else _before(tensors, tensor.name)) + layer + tensor.name

        def fitted(name: str, axes: str, shape: tuple[int, ...]) -> np.ndarray:
            try:
                return hugging_face.fitted(tensors[name], tensor, axes, shape)
            except ValueError as error:
                raise ValueError(str(error) if name in str(error) else f"{folder}: {name}: {error}") from None

        if "{e}" not in name:
            return fitted(name, axes, shape)
        each = [fitted(name.format(e=e), axes.replace("E", ""), shape[1:]) for e in range(shape[axes.index("E")])]
        return np.stack(each)

    return take


def _before(tensors: Tensors, name: str) -> str:
    return next((found.removesuffix(name) for found in tensors.names if found.endswith(name)), "")


# As one program, which keeps no float32 copies of a weight on its way.
_quantize = jax.jit(quantized.quantize, static_argnums=(1, 2))


def _filled(config: ModelConfig, plain: ModelConfig, take: Take) -> Params:
    """The parameters of `config`, each taken as `plain` has it and quantised if `config` wants that."""
    model = nnx.eval_shape(lambda: Transformer(plain, nnx.Rngs(0)))
    scheme = quantized.Scheme.parse(config.weights) if plain.weights == "full" else None
    shapes, axes, inputs = split(model)[1], logical_axes(model), contracted_axes(model)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, letters: str, contracted: str) -> Any:
        keys = [key.key for key in path]
        places, stacked = _places(plain, keys), _is_stacked(plain, keys)
        each = letters.removeprefix("L") if stacked else letters
        size = shape.shape[1:] if stacked else shape.shape
        parts = []
        for place in places:
            array = np.asarray(take(place, each, size)).astype(shape.dtype, copy=False)
            if scheme is not None and contracted:
                values, scale = _quantize(array, tuple(each.index(a) for a in contracted), scheme)
                parts.append({"values": values, "scale": scale})
            else:
                parts.append(array)
        whole = jax.tree.map(lambda *some: np.stack(some), *parts) if stacked else parts[0]
        # Told the type, jax makes an array of it; else it compiles a program for each shape that does.
        return jax.tree.map(lambda array: jnp.asarray(array, array.dtype), whole)

    return jax.tree_util.tree_map_with_path(leaf, shapes, axes, inputs)


def _is_stacked(config: ModelConfig, keys: list[Any]) -> bool:
    return keys[0] == "layers" and config.resolve().layers == "scan"


def _places(config: ModelConfig, keys: list[Any]) -> list[str]:
    """The paths in the unrolled model of what is at a path of ours: one, or one for each layer of a stack."""
    if not _is_stacked(config, keys):
        return ["/".join(map(str, keys))]
    run, place = int(keys[1]), int(keys[2])
    before = sum(part.times * len(part.kinds) for part in config.runs[:run])
    period = len(config.runs[run].kinds)
    layers = [before + n * period + place for n in range(config.runs[run].times)]
    return ["/".join(map(str, ["layers", layer, *keys[3:]])) for layer in layers]


def write(folder: Path | str, config: ModelConfig, params: Params) -> None:
    """Writes a checkpoint of ours; it appears whole or not at all. OSError where it cannot be written."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        keys = [key.key for key in path]
        stacked, whole = _is_stacked(config, keys), np.asarray(array)
        for n, place in enumerate(_places(config, keys)):
            one = whole[n] if stacked else whole
            if one.dtype == jnp.int4:
                tensors[place + ":int4"] = _packed(one)
            else:
                tensors[place] = np.ascontiguousarray(one)
    beside = folder / f".{TENSORS}.new"  # the same each time, so that what a killed program left goes
    try:
        save_file(tensors, beside)
        os.replace(beside, folder / TENSORS)
    finally:
        beside.unlink(missing_ok=True)
    stored = replace(config, layers="auto", param_dtype="auto", dtype=_dtype_of(config, params))
    (folder / CONFIG).write_text(json.dumps(stored.to_json(), indent=1))


def _dtype_of(config: ModelConfig, params: Params) -> str:
    floats = [leaf.dtype.name for leaf in jax.tree.leaves(params["final_norm"])]
    return floats[0] if floats else config.dtype


def _packed(values: np.ndarray) -> np.ndarray:
    """int4 of any shape -> uint8 [(n + 1) / 2], the first of two in the low half."""
    flat = np.asarray(values, np.int8).reshape(-1) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)).astype(np.uint8)
    return flat[::2] | flat[1::2] << 4


def _unpacked(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    if len(packed) != (count + 1) // 2:
        raise ValueError(f"an int4 tensor has {len(packed)} bytes; shape {list(shape)} asks for {(count + 1) // 2}")
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    return np.where(both > 7, both - 16, both).astype(jnp.int4).reshape(shape)
