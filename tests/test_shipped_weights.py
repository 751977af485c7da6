"""The networks in weights/ are those that were measured: their digests, and what they say of three phantoms."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

import cxa_jax
from cxa_jax.weights_export import MAX_LOGIT_DIFFERENCE, PHANTOM_PATIENTS, PHANTOM_PX, PHANTOMS, draw_phantoms
from cxa_jax.weights_file import read_weights
from cxa_jax.weights_registry import FOLDER, find_weights, list_names

MAX_MB = 16  # of all together
NAMES = list_names()
# Of logits: other processors add up in another order; another rounding of a drawing, one grey level here and there,
# moves them by some .04.
SAME_DRAWING, OTHER_ROUNDING = 5e-3, 0.1


def test_there_is_what_the_documents_name():
    assert "nih128" in NAMES and (FOLDER / "README.md").is_file()
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_MB * 1e6


@pytest.mark.parametrize("name", NAMES)
def test_digest_and_description(name):
    path = find_weights(name)
    reference = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == reference["sha256"] and reference["file"] == path.name
    told = read_weights(path).description
    if told["dtype"] == "float16":
        assert told["largest_logit_difference"] <= MAX_LOGIT_DIFFERENCE
    assert not told["is_phantom"] and told["views"] and "input_statistics.json" in told["companions"]
    assert not [value for value in told["config"].values() if str(value).startswith(("/", "~"))]  # no machine's paths


@pytest.mark.parametrize("name", NAMES)
def test_says_of_phantoms_what_is_stored(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())["phantoms"]
    asked = {"patients": list(PHANTOM_PATIENTS), "size_px": PHANTOM_PX} | dataclasses.asdict(PHANTOMS)
    assert {field: stored[field] for field in asked} == asked
    images = draw_phantoms()
    is_same = hashlib.sha256(images.tobytes()).hexdigest() == stored["images_sha256"]
    tolerance = SAME_DRAWING if is_same else OTHER_ROUNDING
    network = cxa_jax.load_weights(name)
    out = network.predict(images)
    np.testing.assert_allclose(out["logit"], stored["logits"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(out["score"], stored["scores"], rtol=0, atol=tolerance / 4)  # the sigmoid's slope
    np.testing.assert_allclose(out["attention"].mean((1, 2)), stored["mean_attention"], rtol=0, atol=tolerance)
    assert np.ptp(stored["logits"]) > 10 * tolerance, "these phantoms could be exchanged unseen"
