"""config.model.batch_norm_momentum: every running moment of every graph moves by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import jit
from same_function import perturbed_variables

from cxa_jax.errors import UserError
from cxa_jax.models import create_model


def make_model(momentum, **fields):
    config = tiny.make_config(**{"model.batch_norm_momentum": momentum}).model.copy_and_resolve_references()
    config.unlock()
    config.update({"dropout": 0.0, **fields})
    return create_model(config)


@pytest.mark.parametrize(
    ("implementation", "fields"),
    [
        ("plain", {}),
        ("plain", {"pooling": "gap", "attended": "all_normalized"}),
        ("fused", {"stride": 8}),
        ("kernels", {"stride": 8}),
        ("fused", {"backbone": "resnet50", "stride": 8}),
        ("plain", {"backbone": "inception_resnet_v2", "stride": 8}),
    ],
)
def test_every_running_moment_moves_by_it(implementation, fields):
    """running' = m running + (1 - m) batch, so two momenta must tell of the same batch moments, everywhere."""
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    told = []
    for momentum in (0.9, 0.5):
        model = make_model(momentum, **fields)
        fewer = {} if "backbone" not in fields else {"num_blocks": (1, 1, 1)}
        model = model.clone(backbone=model.backbone.clone(implementation=implementation, **fewer))
        if not told:
            variables = perturbed_variables(model, images, jnp.float32)
        step = jit(lambda v, x, model=model: model.apply(v, x, train=True, mutable=["batch_stats"])[1])
        after = step(variables, images)["batch_stats"]
        told.append(
            jax.tree.map(lambda new, old, m=momentum: (new - m * old) / (1 - m), after, variables["batch_stats"])
        )
    moved = jax.tree.map(lambda batch, old: float(np.abs(batch - old).max()), told[0], variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *told)
    norms = {"backbone", "feature_norm" if "pooling" in fields else "amm"}
    assert set(told[0]) == norms


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_other_shares_are_refused(momentum):
    with pytest.raises(UserError, match="config.model.batch_norm_momentum=.* must be at least 0 and below 1"):
        make_model(momentum)
