"""Short cuts: attributes against scikit-learn, covered images and energies against loops, toy networks, the lines."""

import types

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxa_jax import short_cuts
from cxa_jax.attribute_baseline import AttributeEncoder, describe_attribute_baseline, score_attributes
from cxa_jax.boxes import compute_median_box
from cxa_jax.data.datasets import Dataset, Split
from cxa_jax.evaluate import evaluate_split
from cxa_jax.heat_maps import scale_map, upsample_maps
from cxa_jax.localization import BoxedImages
from cxa_jax.map_energy import describe_energy, measure_energy
from cxa_jax.predictions import PredictionTable
from cxa_jax.sharding import create_mesh
from cxa_jax.short_cut_lines import write_energy, write_short_cuts
from cxa_jax.thumbnail import INVERSE_REGULARIZATIONS

OPTIONS = {"num_resamples": 50, "seed": 0}
SIZE, STRIDE, OFFSET = 32, 8, 3


@pytest.fixture
def rng():
    return np.random.default_rng()


def draw_attributes(rng: np.random.Generator, num_images: int, views: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Draw labels that view and age tell something of; some sexes and ages are missing."""
    view, sex = rng.choice(views, num_images), rng.choice(["M", "F", ""], num_images)
    age = np.where(rng.random(num_images) < 0.2, rng.choice([-1, 151], num_images), rng.integers(0, 95, num_images))
    label = (rng.random(num_images) < 0.15 + 0.3 * (view == "AP") + 0.4 * (age > 50)).astype(np.int32)
    patient = np.array([f"p{row // 2}" for row in range(num_images)])
    return {"label": label, "patient": patient, "view": view, "sex": sex, "age": age}


def encode_slowly(rows: dict[str, np.ndarray], train: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    ages = [age for age in train["age"] if 0 <= age < 150]
    mean, deviation = sum(ages) / len(ages), np.std(ages)
    matrix = []
    for row in range(len(rows["view"])):
        values = []
        for name in names:
            if name == "age":
                age = float(rows["age"][row])
                values += [(age - mean) / deviation, 0] if 0 <= age < 150 else [0, 1]
            else:
                levels = sorted(set(train[name]) - {""})
                values += [int(rows[name][row] == level) for level in levels]
                values.append(int(rows[name][row] not in levels))
        matrix.append(values)
    return np.array(matrix, float)


def fit_slowly(columns: np.ndarray, labels: np.ndarray, patients: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Choose C by the mean AUROC of folds of whole patients, then fit all: each step by scikit-learn."""

    def fit(rows, value, wanted):
        scaler = StandardScaler().fit(columns[rows])
        model = LogisticRegression(C=value, max_iter=2000).fit(scaler.transform(columns[rows]), labels[rows])
        return model.predict_proba(scaler.transform(wanted))[:, 1]

    folds = list(StratifiedGroupKFold(5).split(columns, labels, patients))
    with threadpool_limits(1):
        means = [
            np.mean([roc_auc_score(labels[held], fit(rows, value, columns[held])) for rows, held in folds])
            for value in INVERSE_REGULARIZATIONS
        ]
        return fit(np.arange(len(labels)), INVERSE_REGULARIZATIONS[int(np.argmax(means))], others)


def test_attributes_alone_are_scikit_learns(rng):
    train, test = draw_attributes(rng, 300, ("AP", "PA")), draw_attributes(rng, 120, ("AP", "PA", "LL"))
    scores = score_attributes(train, test)
    assert list(scores) == [("view",), ("sex",), ("age",), ("view", "sex", "age")]
    for names, found in scores.items():
        columns = encode_slowly(train, train, names)
        np.testing.assert_allclose(AttributeEncoder.fit(train).encode(train, names), columns, atol=1e-12)
        if names in (("age",), ("view", "sex", "age")):
            expected = fit_slowly(columns, train["label"], train["patient"], encode_slowly(test, train, names))
            np.testing.assert_allclose(found, expected, atol=1e-6)
    network = rng.random(120)
    attributes = {name: test[name].astype(str) for name in ("view", "sex", "age")}  # as a predictions file has them
    ids = np.arange(120).astype(str)
    table = PredictionTable(ids, test["label"], network, test["patient"], None, attributes)
    report = describe_attribute_baseline(train, table, **OPTIONS)
    together = roc_auc_score(test["label"], scores["view", "sex", "age"])
    assert report["known"] == ["view", "sex", "age"] and report["num_train_images"] == 300
    assert report["together"]["estimate"] == pytest.approx(together)
    assert report["together"]["low"] < together < report["together"]["high"]
    assert report["alone"]["view"]["estimate"] == pytest.approx(roc_auc_score(test["label"], scores["view",]))
    above = report["network_above"]["estimate"]
    assert above == pytest.approx(roc_auc_score(test["label"], network) - together)


def test_what_does_not_vary_in_training_is_left_out(rng):
    train, test = draw_attributes(rng, 200, ("PA",)), draw_attributes(rng, 60, ("AP", "PA"))
    assert list(score_attributes(train, test)) == [("sex",), ("age",), ("sex", "age")]
    train |= {"sex": np.full(200, ""), "age": np.full(200, -1)}
    assert score_attributes(train, test) == {}
    table = PredictionTable(test["patient"], test["label"], rng.random(60), test["patient"])
    assert describe_attribute_baseline(train, table, **OPTIONS) is None
    train = draw_attributes(rng, 200, ("AP", "PA"))
    assert describe_attribute_baseline(train, table, **OPTIONS) is None  # of test nothing is known
    train["label"][:] = 0
    table = PredictionTable(table.id, table.label, table.score, table.patient, None, test)
    assert describe_attribute_baseline(train, table, **OPTIONS) is None


def test_covered_pixels_are_those_of_a_loop(rng):
    image = rng.integers(0, 256, (9, 12, 1), dtype=np.uint8)
    x, y, w, h = *rng.uniform(0, 4, 2), *rng.uniform(2, 4, 2)
    for inside in (False, True):
        stays, total = np.zeros((9, 12), bool), []
        for row in range(9):
            for column in range(12):
                wide = max(0.0, min(x + w, column + 1) - max(x, column))
                high = max(0.0, min(y + h, row + 1) - max(y, row))
                stays[row, column] = (wide * high >= 0.5) == inside
                total += [int(image[row, column, 0])] if stays[row, column] else []
        covered = short_cuts.cover_image(image, (x, y, w, h), inside)
        assert covered.dtype == np.uint8 and covered.shape == image.shape
        np.testing.assert_array_equal(covered[stays], image[stays])
        assert (covered[~stays] == round(sum(total) / len(total))).all() and (~stays).any()
    assert not short_cuts.cover_image(image, (0, 0, 12, 9), False).any()  # nothing stays


class Toy:
    """A run whose network reads a part of the image; pairs of a negative and a positive differ in the heart alone,
    or around it alone.
    """

    def __init__(self, rng: np.random.Generator, network: str, differ: str):
        heart = np.zeros((SIZE, SIZE, 1), bool)
        heart[8:20, 10:24] = True
        self.box = np.array([10.0, 8, 14, 12])
        place = heart if differ == "heart" else ~heart
        images = np.repeat(rng.integers(0, 150, (20, SIZE, SIZE, 1), dtype=np.uint8), 2, axis=0)
        images[1::2][:, place] += 60
        label = np.tile(np.array([0, 1], np.int32), 20)
        ids = np.arange(40).astype(str)
        index = {"id": ids, "patient": ids, "label": label, "view": np.where(np.arange(40) % 4 < 2, "AP", "PA")}
        self.split = Split("test", [{"image": image} for image in images], index)
        looks = heart if network == "heart" else ~heart

        def test_step(variables, batch):
            pixels = np.asarray(batch, np.float32)
            maps = np.broadcast_to(np.linspace(0.1, 0.9, 16, dtype=np.float32).reshape(4, 4), (len(pixels), 4, 4))
            logit = pixels[:, looks].mean(axis=1) / 50
            return {"logit": logit, "attention": maps, "evidence": maps - 0.5, "weights": maps}

        train = Split("train", [], {name: values[:0] for name, values in index.items()})
        self.run = types.SimpleNamespace(
            test_step=test_step,
            dataset=Dataset("chest_phantom", SIZE, {"train": train, "test": self.split}, "f", "toy"),
            mesh=create_mesh(jax.devices()[:1]),
            model=types.SimpleNamespace(backbone=types.SimpleNamespace(stride=STRIDE, offset=OFFSET)),
            config=types.SimpleNamespace(
                eval=types.SimpleNamespace(batch_size=16, num_bootstrap=50),
                data=types.SimpleNamespace(num_threads=0),
                seed=0,
            ),
        )
        self.boxed = BoxedImages(np.arange(1, 40, 2), np.tile(self.box, (20, 1)), None)
        self.test = evaluate_split(test_step, None, self.split, self.run.mesh, batch_size=16, num_threads=0)

    def measure(self) -> dict:
        return short_cuts.measure_short_cuts(self.run, None, self.test, self.boxed, None)


@pytest.mark.parametrize("place", ["heart", "elsewhere"])
def test_a_network_of_one_place_is_blind_without_it(rng, place):
    toy = Toy(rng, place, place)
    found = toy.measure()["heart_box"]
    blind, seeing = ("heart_greyed", "heart_alone") if place == "heart" else ("heart_alone", "heart_greyed")
    assert found["whole"]["estimate"] > 0.95
    assert found[blind]["estimate"] == 0.5  # the fill tells nothing of what it hides
    assert found[seeing]["estimate"] == pytest.approx(found["whole"]["estimate"])
    assert found[f"{blind}_less_whole"]["estimate"] == pytest.approx(0.5 - found["whole"]["estimate"])
    np.testing.assert_allclose(found["box"], toy.box)
    assert found["share_of_image"] == pytest.approx(14 * 12 / SIZE**2) and found["num_boxed_patients"] == 20
    change = np.mean(
        [
            (short_cuts.cover_image(toy.split.source[row]["image"], toy.box, False)[8:20, 10:24].mean()) / 50
            - toy.test.logit[row]
            for row in toy.boxed.rows
        ]
    )
    if place == "heart":
        assert found["own_box"]["heart_greyed_logit_change"]["estimate"] == pytest.approx(change, abs=1e-5)
        assert found["own_box"]["heart_alone_logit_change"]["estimate"] == pytest.approx(0, abs=1e-6)


def test_without_boxes_nothing_is_covered(rng):
    toy = Toy(rng, "heart", "heart")
    toy.boxed = BoxedImages(np.empty(0, int), np.empty((0, 4)), None)
    toy.run.test_step = None  # no pass over the images
    found = toy.measure()
    assert found == {"attributes": None, "heart_box": None, "energy": None}
    lines = write_short_cuts(found, str)
    assert "do not vary" in lines[0] and "no positive test image has a box" in lines[1]
    assert write_energy(found, str) == []


def test_energy_by_view_and_label_is_a_loops(rng):
    num_images = 70
    evidence, attention = rng.normal(size=(num_images, 4, 4)), rng.random((num_images, 4, 4))
    evidence[3] = -1  # a map of zeros where signed ones are cut
    box, views = (5.5, 3.0, 12.0, 9.5), rng.choice(["AP", "PA", ""], num_images, p=[0.5, 0.45, 0.05])
    labels, patients = rng.integers(0, 2, num_images), np.arange(num_images) // 2
    energy = measure_energy({"evidence": evidence, "attention": attention}, box, SIZE, STRIDE, OFFSET)
    assert set(energy) >= {"evidence", "evidence_absolute", "attended_evidence", "attention"}
    assert np.isnan(energy["evidence"][3])
    for name, maps, scaling in (("evidence", evidence, "positive"), ("attention", attention, "unit")):
        for row in rng.choice(np.delete(np.arange(num_images), 3), 5):
            values = scale_map(upsample_maps(maps[row], SIZE, STRIDE, OFFSET), scaling)
            inside = values[3:12, 6:17].sum() + 0.5 * (values[3:12, 5].sum() + values[3:12, 17].sum())
            inside += 0.5 * values[12, 6:17].sum() + 0.25 * (values[12, 5] + values[12, 17])
            assert energy[name][row] == pytest.approx(inside / values.sum() / (12 * 9.5 / SIZE**2))
    rows = describe_energy(energy, views, labels, patients, **OPTIONS)
    assert [(row["view"], row["label"]) for row in rows[:3]] == [
        ("all", "all"),
        ("all", "negative"),
        ("all", "positive"),
    ]
    assert {row["view"] for row in rows} >= {"all", "AP", "PA"}
    for row in rows:
        mask = np.ones(num_images, bool) if row["view"] == "all" else views == row["view"].replace("unknown", "")
        if row["label"] != "all":
            mask &= labels == (row["label"] == "positive")
        assert row["num_images"] == mask.sum() and row["num_patients"] == len(np.unique(patients[mask]))
        assert row["too_small"] == (row["num_patients"] < 10) == (not row["maps"])
        for name, interval in row["maps"].items():
            assert interval["estimate"] == pytest.approx(np.nanmean(energy[name][mask]))
            assert interval["low"] < interval["estimate"] < interval["high"]


def test_one_view_splits_nothing(rng):
    rows = describe_energy({"cam": rng.random(30)}, np.full(30, "PA"), np.ones(30, int), np.arange(30), **OPTIONS)
    assert [(row["view"], row["label"]) for row in rows] == [("all", "all")]
    assert describe_energy({}, np.empty(0, str), np.empty(0, int), np.empty(0), **OPTIONS) == []


def test_the_median_box_is_that_of_edges(rng):
    boxes = rng.uniform(1, 20, (9, 4))
    left, top, width, height = compute_median_box(boxes)
    corners = (boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3])
    assert (left, top, left + width, top + height) == pytest.approx([np.median(corner) for corner in corners])


def test_lines_say_it_in_plain_words(rng):
    toy = Toy(rng, "heart", "heart")
    found = toy.measure() | {
        "attributes": {"known": ["view", "sex"], "together": "A", "network_above": "B"}  # as `str` writes intervals
    }
    first, second = write_short_cuts(
        found, lambda value: value if isinstance(value, str) else f"{value['estimate']:.2f}"
    )
    assert first == "view, sex alone, logistic regression: AUROC A; the network above it B"
    assert second.startswith("heart greyed out: AUROC 0.50, less the whole image's -0.") and "20 patients" in second
    lines = write_energy(found, lambda value: f"{value['estimate']:.2f}")
    starts = [f"energy of {title} in the median box" for title in ("attention W", "class evidence")]
    assert all(line.startswith(start) and ", PA " in line for line, start in zip(lines, starts, strict=True))
