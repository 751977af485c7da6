"""A map for each finding: the network by hand, the loss, a whole run, and what is refused."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import initialize, jit
from sklearn.metrics import roc_auc_score

from configs import dense121
from cxa_jax import run as run_module
from cxa_jax.errors import UserError
from cxa_jax.evaluate import Predictions
from cxa_jax.finding_metrics import write_findings
from cxa_jax.findings import CARDIOMEGALY, FINDINGS, OTHERS, encode_findings
from cxa_jax.losses import mean_loss_of_others, weighted_binary_cross_entropy
from cxa_jax.models import CardioXAttentionNet, create_model
from cxa_jax.pooling import gwap
from cxa_jax.train import train_and_evaluate


def draw_findings(labels, seed):
    """Return texts as in the records: 'No Finding', or Cardiomegaly and perhaps others."""
    rng = np.random.default_rng(seed)
    others = [[FINDINGS[place] for place in OTHERS if rng.random() < 0.3] for _ in labels]
    return ["|".join(sorted(["Cardiomegaly", *more])) if label else "No Finding" for label, more in zip(labels, others)]  # noqa: B905


def make_dataset():
    """Return the tiny data set as if it were X-rays with several findings each."""
    dataset = dataclasses.replace(tiny.make_dataset(), name="chestxray14")
    for seed, split in enumerate(dataset.splits.values()):
        split.index["findings"] = np.array(draw_findings(split.index["label"], seed))
    return dataset


def test_texts_become_ones_where_a_finding_is_named():
    codes = encode_findings(np.array(["No Finding", "Cardiomegaly|Effusion", "Pleural_Thickening", "Mass"]))
    assert codes.shape == (4, 14) and codes.sum() == 4
    assert codes[1, CARDIOMEGALY] == codes[1, FINDINGS.index("Effusion")] == 1
    assert codes[2, FINDINGS.index("Pleural_Thickening")] == codes[3, FINDINGS.index("Mass")] == 1
    assert encode_findings(np.array([], str)).shape == (0, 14)


def test_each_finding_is_pooled_with_its_own_map_and_read_with_its_own_weights():
    model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), num_labels=14)
    images = jax.random.uniform(jax.random.key(1), (3, 96, 64, 3))
    variables = initialize(model, jax.random.key(0), images)
    logits, out = jit(model.apply)(variables, images)
    assert out["finding_attention"].shape == (3, 3, 2, 14) and out["attention"].shape == (3, 3, 2, 1)
    head = variables["params"]["classifier"]
    attention = np.asarray(out["finding_attention"], np.float64)
    for place in range(14):
        z = jnp.asarray(np.log(attention[..., place, None]) - np.log1p(-attention[..., place, None]), jnp.float32)
        hidden = jax.nn.elu(gwap(out["features"], z) @ head["dense1"]["kernel"] + head["dense1"]["bias"])
        expected = hidden @ head["logit"]["kernel"][:, place] + head["logit"]["bias"][place]
        np.testing.assert_allclose(out["finding_logits"][:, place], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(logits, out["finding_logits"][:, CARDIOMEGALY])
    np.testing.assert_array_equal(out["attention"][..., 0], out["finding_attention"][..., CARDIOMEGALY])
    np.testing.assert_allclose(out["pooled"], gwap(out["features"], out["attention_logits"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.apply(variables, out["pooled"], method="classify"), logits, rtol=1e-4, atol=1e-5)


def test_loss_of_the_others_is_their_plain_mean():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(5, 14)).astype(np.float32), rng.integers(0, 2, (5, 14)).astype(np.int32)
    loss = mean_loss_of_others(weighted_binary_cross_entropy, jnp.asarray(logits), jnp.asarray(labels))
    every = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    np.testing.assert_allclose(loss, (every.sum(1) - every[:, CARDIOMEGALY]) / 13, rtol=1e-5)


def test_metrics_and_files_of_each_finding(tmp_path):
    split = make_dataset().splits["train"]
    labels, rng = split.index["label"], np.random.default_rng(3)
    logits = rng.normal(size=(len(labels), 14)).astype(np.float32)
    maps = np.zeros((len(labels), 2, 2), np.float32)
    test = Predictions("test", split.index, labels, logits[:, CARDIOMEGALY], maps, maps, maps, finding_logits=logits)
    write_findings(test, num_resamples=50, seed=0, output=tmp_path)
    metrics = json.loads((tmp_path / "findings_test.json").read_text())
    codes = encode_findings(split.index["findings"])
    for place, name in enumerate(FINDINGS):
        assert metrics[name]["num_positives"] == codes[:, place].sum()
        assert metrics[name]["auroc"]["estimate"] == pytest.approx(roc_auc_score(codes[:, place], logits[:, place]))
        if place != CARDIOMEGALY:
            within = roc_auc_score(codes[labels == 1, place], logits[labels == 1, place])
            assert metrics[name]["auroc_within_cardiomegaly"]["estimate"] == pytest.approx(within)
    assert metrics["Cardiomegaly"]["auroc_within_cardiomegaly"] is None
    with (tmp_path / "findings_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == split.index["id"].tolist()
    np.testing.assert_array_equal([[float(row[f"{name}_logit"]) for name in FINDINGS] for row in rows], logits)
    np.testing.assert_array_equal([[int(row[f"{name}_label"]) for name in FINDINGS] for row in rows], codes)


@pytest.mark.slow
def test_a_run_reports_cardiomegaly_as_ever_and_the_rest_in_files_of_their_own(tmp_path, monkeypatch):
    dataset = make_dataset()
    monkeypatch.setattr(run_module, "load_dataset", lambda config: dataset)
    train_and_evaluate(tiny.make_config(**{"model.labels": "findings", "train.num_epochs": 1}), str(tmp_path))
    with (tmp_path / "predictions_test.csv").open() as file:
        primary = list(csv.DictReader(file))
    with (tmp_path / "findings_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [row["id"] for row in primary] == dataset.splits["test"].index["id"].tolist()
    assert [float(row["Cardiomegaly_logit"]) for row in rows] == [float(row["logit"]) for row in primary]
    metrics = json.loads((tmp_path / "findings_test.json").read_text())
    within = [row for row in rows if row["Cardiomegaly_label"] == "1"]
    for name in ("Edema", "Mass"):
        for subset, key in ((rows, "auroc"), (within, "auroc_within_cardiomegaly")):
            label = [int(row[f"{name}_label"]) for row in subset]
            expected = roc_auc_score(label, [float(row[f"{name}_logit"]) for row in subset])
            assert metrics[name][key]["estimate"] == pytest.approx(expected)
        assert metrics[name]["num_positives"] == sum(int(row[f"{name}_label"]) for row in rows)
    assert metrics["Cardiomegaly"]["auroc_within_cardiomegaly"] is None


def test_phantoms_have_no_other_findings(monkeypatch):
    monkeypatch.setattr(run_module, "load_dataset", lambda config: tiny.make_dataset())
    with pytest.raises(UserError, match=r"needs ChestX-ray14 .*\(chest_phantom\) know cardiomegaly alone"):
        run_module.create_run(tiny.make_config(**{"model.labels": "findings"}))


@pytest.mark.parametrize(("field", "value"), [("pooling", "gap"), ("pooling", "gated"), ("head", "linear")])
def test_a_map_for_each_finding_needs_the_branch_and_the_mlp(field, value):
    config = dense121.get_config().model
    config.labels, config[field] = "findings", value
    with pytest.raises(UserError, match=f"its own attention map.*{value}"):
        create_model(config)
