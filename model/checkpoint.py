"""Checkpoints on disk: our own format, a folder with `model.json` and safetensors."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from .config import ModelConfig
from .transformer import Params


def write(folder: Path, config: ModelConfig, params: Params) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(config.to_json(), indent=1))
    save_file(
        {"/".join(str(k.key) for k in p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)},
        folder / "model.safetensors",
    )
