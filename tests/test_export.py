"""The exported file says what the live network says, for any batch, bytes or floats; and jax alone runs it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import saved_run
from jax import export as jax_export
from PIL import Image

from cxa_jax.errors import UserError
from cxa_jax.export import ARTEFACT, DESCRIPTION, PLATFORMS, export

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "run_exported.py"
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64), np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run, variables = saved_run.save_run(folder)
    padded = np.concatenate([IMAGES, IMAGES[:3]])[..., None]
    live = {name: np.asarray(value)[:5] for name, value in run.eval_step(variables, padded).items()}
    path = export(str(folder))
    return path, jax_export.deserialize(bytearray((path / ARTEFACT).read_bytes())), live


@pytest.mark.parametrize(("num_bytes", "num_floats"), [(5, 0), (0, 5), (2, 3), (1, 0)])
def test_equals_the_live_network(exported, num_bytes, num_floats):
    _, network, live = exported
    rows = slice(0, num_bytes + num_floats)
    out = network.call(uint8=IMAGES[:num_bytes], float32=IMAGES[num_bytes : rows.stop].astype(np.float32))
    np.testing.assert_allclose(out["logit"], live["logit"][rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["attention"], live["attention"][rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["probability"], 1 / (1 + np.exp(-live["logit"][rows])), rtol=1e-4, atol=1e-5)


def test_fractional_grey_levels_are_not_rounded(exported):
    _, network, _ = exported
    none, parts = IMAGES[:0], IMAGES[:1] / np.float32(64)
    out = network.call(uint8=none, float32=parts)
    same = network.call(uint8=none, float32=IMAGES[:1].astype(np.float32))  # min-max knows no scale
    rounded = network.call(uint8=parts.astype(np.uint8), float32=parts[:0])
    np.testing.assert_allclose(out["logit"], same["logit"], rtol=1e-4, atol=1e-5)
    assert abs(float(rounded["logit"][0] - out["logit"][0])) > 1e-4


def test_describes_itself(exported):
    path, network, _ = exported
    assert set(network.platforms) == set(PLATFORMS) == {"cpu", "cuda"}
    assert {(str(aval.dtype), aval.shape[1:]) for aval in network.in_avals} == {
        ("uint8", (64, 64)),
        ("float32", (64, 64)),
    }
    assert "stablehlo" in network.mlir_module()
    description = json.loads((path / DESCRIPTION).read_text())
    assert description["threshold"] == saved_run.THRESHOLD and description["calibration"] == saved_run.PLATT
    assert "not a medical device" in description["remark"] and description["trained_on_phantoms"] is True


def test_the_example_runs_without_the_project(exported, tmp_path):
    path, _, live = exported
    assert len(EXAMPLE.read_text().splitlines()) <= 20 and "cxa_jax" not in EXAMPLE.read_text()
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    command = [sys.executable, str(EXAMPLE), str(path / ARTEFACT), "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    expected = 1 / (1 + np.exp(-float(live["logit"][0])))
    assert float(done.stdout.split("probability ")[1].split(",")[0]) == pytest.approx(expected, abs=1e-4)


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no trained run"):
        export(str(tmp_path))
