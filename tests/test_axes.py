"""Where the parameters of a training step lie on a mesh whose chips share experts out."""

import pytest
from jax.sharding import PartitionSpec
from stepbill.model.axes import spec
from stepbill.profiling import targets

OVER = ("data", "expert")


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("LEDF", (3, 8, 16, 12), (None, "expert", "data", "tensor")),  # each expert is on its own chips alone
        ("ED", (8, 16), ("expert", "data")),
        ("DNH", (16, 4, 8), (OVER, "tensor", None)),
        ("D", (16,), (OVER,)),
        ("DNH", (18, 4, 8), (None, "tensor", None)),  # four chips do not divide it
        ("DC", (16, 12), (OVER, None)),
        ("QNH", (12, 4, 8), (OVER, "tensor", None)),  # of latent attention: no D, and more than the rest of it
    ],
)
def test_what_is_no_experts_is_split_over_both(axes, shape, expected):
    mesh = targets.mesh("host", {"data": 2, "expert": 2, "tensor": 2})
    assert spec(axes, shape, mesh, training=True) == PartitionSpec(*expected)
    assert OVER not in tuple(spec(axes, shape, mesh))
