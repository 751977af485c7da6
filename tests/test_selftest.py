"""The check of an installation passes here, and fails when a number is off."""

import numpy as np
import pytest

from cxa_jax import selftest
from cxa_jax.errors import UserError
from cxa_jax.models import dense_kernels, fused_dense_block


def test_passes_here_and_names_every_comparison():
    differences = selftest.selftest()
    assert len(differences) == 1 + len(selftest.OUTPUTS) * len(selftest.IMPLEMENTATIONS) + 2
    assert differences["phantoms, grey levels"] <= selftest.MAX_LEVELS
    assert max(value for name, value in differences.items() if name.endswith("graph")) < 1e-4


def test_stored_values_are_worth_comparing():
    with np.load(selftest.VALUES) as stored:
        assert stored["images"].shape == (selftest.NUM_IMAGES, selftest.SIZE, selftest.SIZE)
        assert (
            np.ptp(stored["score"]) > 0.02 and np.ptp(stored["attention"]) > 0.1 and np.ptp(stored["evidence"]) > 0.02
        )
    assert selftest.VALUES.stat().st_size < 100_000


@pytest.mark.slow  # a minute; test_gpu_kernels.py has the kernels themselves
def test_gpu_kernels_are_checked_where_they_run(monkeypatch):
    """As on a GPU, but that the kernels run as plain JAX here; a kernel that is wrong by a tenth is found."""
    monkeypatch.setattr(selftest, "is_available", lambda: True)
    monkeypatch.setattr(selftest, "IMPLEMENTATIONS", ())
    differences = selftest.selftest()
    assert 0 < differences["gradients, kernels graph, relative"] < 2e-3
    assert 0 <= differences["batch statistics, kernels graph, relative"] < 1e-6
    right = dense_kernels.undo_bottleneck

    def wrong(features, g_features, *args):
        g_features, *others = right(features, g_features, *args)
        return 1.1 * g_features, *others

    monkeypatch.setattr(fused_dense_block, "KERNELS", fused_dense_block.KERNELS._replace(undo_bottleneck=wrong))
    with pytest.raises(UserError, match="gradients, kernels graph, relative beyond"):
        selftest.selftest()


@pytest.mark.parametrize("error", [0.01, np.nan])
def test_a_wrong_number_fails(monkeypatch, error):
    with np.load(selftest.VALUES) as stored:
        values = dict(stored)
    values["attention"] = values["attention"] + error
    monkeypatch.setattr(selftest, "draw_images", lambda: values["images"])
    monkeypatch.setattr(selftest, "compute_outputs", lambda images, implementation: values)
    with pytest.raises(UserError, match="attention, plain graph, attention, fused graph beyond"):
        selftest.selftest()
