"""The cardiothoracic ratio: truth from masks, the cascade's parts against scikit-learn, its error on fresh drawings."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.ndimage import shift as move
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxa_jax import cardiothoracic
from cxa_jax.cardiothoracic import (
    FILE,
    compute_ratios,
    dump_ratio_reader,
    find_fault,
    fit_ratio_reader,
    load_ratio_reader,
    measure_image,
    parse_ratio_reader,
    read_edges,
    read_ratios,
    save_ratio_reader,
)
from cxa_jax.data import phantom_render
from cxa_jax.data.phantom import PhantomSpec, sample_image
from cxa_jax.data.phantom_geometry import draw_lung_mask
from cxa_jax.data.phantom_ratio import draw_measured, measure_edges
from cxa_jax.errors import UserError
from cxa_jax.ratio_fit import draw_chests, fit_on_phantoms, measure_error
from cxa_jax.ridge import apply_ridge, fit_ridge


def draw_mask(rng, shape):
    """A random rectangle with ragged columns: never empty."""
    mask = np.zeros(shape, np.uint8)
    top, left = rng.integers(0, shape[0] - 3), rng.integers(0, shape[1] - 3)
    mask[top : top + rng.integers(2, 9), left : left + rng.integers(2, 12)] = 1
    mask &= rng.random(shape) < 0.7
    mask[top, left] = 1
    return mask


def test_edges_are_those_of_a_loop_over_pixels():
    rng = np.random.default_rng()
    for _ in range(40):
        shape = tuple(int(side) for side in rng.integers(8, 30, 2))
        heart, lungs = draw_mask(rng, shape), draw_mask(rng, shape) | draw_mask(rng, shape)
        best = (0, 0, 0)
        for row in range(shape[0]):
            inside = [column for column in range(shape[1]) if lungs[row, column]]
            if inside and inside[-1] + 1 - inside[0] > best[0]:
                best = (inside[-1] + 1 - inside[0], inside[0], inside[-1] + 1)
        rows = [row for row in range(shape[0]) if lungs[row].any()]
        columns = [column for column in range(shape[1]) if heart[:, column].any()]
        wanted = np.array([best[1], best[2], rows[0], rows[-1] + 1, columns[0], columns[-1] + 1], float)
        wanted /= [shape[1], shape[1], shape[0], shape[0], shape[1], shape[1]]
        np.testing.assert_allclose(measure_edges(heart, lungs), wanted)


@pytest.mark.parametrize("shape", [(8, 9), (8, 8)], ids=["shape", "empty"])
def test_masks_that_say_nothing_are_refused(shape):
    with pytest.raises(UserError, match="none empty"):
        measure_edges(np.ones((8, 8)), np.zeros(shape))


def test_masks_of_a_drawing_have_the_ratio_that_it_was_drawn_with():
    """The heart's width is CTR x T by construction, of a chest that stands straight and within the frame."""
    spec = PhantomSpec("natural", 0.3, 0.0, int(np.random.default_rng().integers(2**31)))
    for patient in range(6):
        latents = dataclasses.replace(sample_image(spec, patient, 0), rotation=0.0, shift=(0.0, 0.0))
        _, heart = phantom_render.render(latents, 384)
        measured = compute_ratios([measure_edges(heart, draw_lung_mask(latents, 384))])[0]
        assert measured == pytest.approx(latents.ctr, abs=0.012)


def test_posed_chests_stay_in_the_frame_and_keep_their_ratio():
    spec = PhantomSpec("natural", 0.3, 0.0, int(np.random.default_rng().integers(2**31)))
    posed, drawn = ([draw_measured((spec, 192, p, moved))[1] for p in range(12)] for moved in (True, False))
    posed, drawn = np.array(posed), np.array(drawn)
    widths = posed[:, 1] - posed[:, 0]
    assert (posed[:, 0] >= 0).all() and (posed[:, 1] <= 1).all() and widths.min() > 0.5 and np.ptp(widths) > 0.1
    whole = (drawn[:, 0] > 0) & (drawn[:, 1] < 1)
    np.testing.assert_allclose(compute_ratios(posed[whole]), compute_ratios(drawn[whole]), atol=0.02)


def test_ridge_is_scikit_learns():
    rng = np.random.default_rng()
    features, targets = rng.normal(3, 2, (40, 7)) * rng.uniform(0.1, 9, 7), rng.normal(size=(40, 3))
    features[:, 2] = 5.0  # constant: left out of the fit
    fresh = rng.normal(3, 2, (9, 7))
    fresh[:, 2] = 5.0
    for alpha, fit in zip((0.3, 30.0), fit_ridge(features, targets, (0.3, 30.0)), strict=True):
        model = make_pipeline(StandardScaler(), Ridge(alpha)).fit(features, targets)
        np.testing.assert_allclose(apply_ridge(fresh, *fit), model.predict(fresh), rtol=1e-9, atol=1e-9)


def test_what_a_step_moves_in_its_fit_is_predicted_by_folds_that_did_not_see_it():
    rng = np.random.default_rng()
    cells = rng.normal(size=(50, 256))
    targets = cells[:, :4] * 0.1 + rng.normal(0, 0.01, (50, 4))
    stage, held_out = cardiothoracic._fit_stage(cells, targets)
    models = {alpha: make_pipeline(StandardScaler(), Ridge(alpha)) for alpha in cardiothoracic.ALPHAS}
    others = {alpha: cross_val_predict(model, cells, targets, cv=KFold(5)) for alpha, model in models.items()}
    best = min(others, key=lambda alpha: np.sum((others[alpha] - targets) ** 2))
    np.testing.assert_allclose(held_out, others[best], rtol=1e-8, atol=1e-10)
    wanted = models[best].fit(cells, targets).predict(cells)
    np.testing.assert_allclose(cardiothoracic._apply(stage, cells), wanted, atol=1e-4)  # six digits of each number


@pytest.fixture(scope="module")
def reader():
    return fit_on_phantoms(1, num_fitted=400, num_held_out=40)


@pytest.fixture(scope="module")
def chests():
    return draw_chests("natural", int(np.random.default_rng().integers(2**31)), range(80), True, 1)


def test_error_on_fresh_drawings_is_within_its_bound(reader, chests):
    error = measure_error(reader, *chests)
    assert error["ratio"]["mean_absolute_error"]["estimate"] < 0.03 and error["ratio"]["num_unmeasured"] == 0
    assert error["ratio"]["correlation"]["estimate"] > 0.8 and abs(error["ratio"]["bias"]["estimate"]) < 0.012
    assert error["thorax_width"]["mean_absolute_error"]["estimate"] < 0.02
    assert reader.facts["num_phantoms"] == 400 and set(reader.facts["error"]) >= {"natural", "hard"}


def test_exposure_place_and_size_change_the_ratio_little(reader, chests):
    images = chests[0][:30]
    ratios, edges = read_ratios(reader, images)
    brighter = (255 * (images / 255.0) ** 0.6 * 0.8 + 20).astype(np.uint8)
    assert np.abs(read_ratios(reader, brighter)[0] - ratios).mean() < 0.01
    moved = np.stack([move(image, (2, 3, 0), order=0, mode="nearest") for image in images])
    again, places = read_ratios(reader, moved)
    assert np.nanmean(np.abs(again - ratios)) < 0.02
    np.testing.assert_allclose((places - edges)[:, [0, 1]].mean(), 3 / 64, atol=0.01)
    larger = images.repeat(2, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(read_edges(reader, larger), edges, atol=1e-6)


def test_a_reader_is_the_same_in_its_file(reader, chests, tmp_path):
    assert load_ratio_reader(tmp_path) is None
    save_ratio_reader(reader, tmp_path)
    assert (tmp_path / FILE).stat().st_size < 100_000
    read, parsed = load_ratio_reader(tmp_path), parse_ratio_reader(dump_ratio_reader(reader), "here")
    wanted = read_edges(reader, chests[0][:5])
    for other in (read, parsed):
        assert np.array_equal(read_edges(other, chests[0][:5]), wanted) and other.facts == reader.facts


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: "{",
        lambda stored: "[]",
        lambda stored: json.dumps(stored | {"stages": stored["stages"][:1]}),
        lambda stored: json.dumps(stored | {"stages": []}),
        lambda stored: json.dumps(stored | {"start": [0, 1, 0]}),
        lambda stored: json.dumps(stored | {"start": [0, 1, 0, None]}),
        lambda stored: json.dumps({key: value for key, value in stored.items() if key != "facts"}),
        lambda stored: json.dumps(stored | {"stages": [stage | {"intercept": 3} for stage in stored["stages"]]}),
        lambda stored: json.dumps(stored | {"stages": [stage | {"coefficients": []} for stage in stored["stages"]]}),
    ],
)
def test_a_damaged_file_is_named_with_its_cure(reader, damage, tmp_path):
    (tmp_path / FILE).write_text(damage(json.loads(dump_ratio_reader(reader))))
    with pytest.raises(UserError, match=rf"{FILE} is damaged .*eval\.cardiothoracic_ratio=True"):
        load_ratio_reader(tmp_path)


@pytest.mark.parametrize(
    ("edges", "fault"),
    [
        ((0.1, 0.9, 0.1, 0.8, 0.4, 0.8), None),
        ((0.9, 0.1, 0.1, 0.8, 0.4, 0.8), "the edges cross"),
        ((0.1, 0.9, 0.1, 0.8, 0.8, 0.4), "the edges cross"),
        ((0.1, 0.9, 0.1, 0.8, 0.1, 0.85), "0.94 is outside 0.25 to 0.9"),
        ((0.1, 0.9, 0.1, 0.8, 0.4, 0.5), "0.12 is outside 0.25 to 0.9"),
        ((np.nan,) * 6, "no edges found"),
    ],
)
def test_implausible_edges_have_no_ratio(edges, fault):
    assert find_fault(edges) == fault


def test_one_grey_level_has_no_ratio_and_other_types_are_refused(reader, chests):
    blank = np.full((64, 64, 1), 90, np.uint8)
    ratios, _ = read_ratios(reader, [blank, chests[0][0]])
    assert np.isnan(ratios[0]) and np.isfinite(ratios[1])
    cells, found = measure_image(reader, blank[..., 0], 500)
    assert set(cells.values()) == {""} and found == ["ratio: no edges found"]
    with pytest.raises(UserError, match="needed is uint8"):
        read_edges(reader, [chests[0][0].astype(float)])
    with pytest.raises(UserError, match="at least 10"):
        fit_ratio_reader(chests[0][:4], chests[1][:4])


def test_widths_are_in_pixels_of_the_file(reader, chests):
    edges = read_edges(reader, chests[0][:1])[0]
    cells, found = measure_image(reader, chests[0][0, ..., 0], 1000)
    assert found == []
    assert float(cells["heart_width"]) == pytest.approx(1000 * (edges[5] - edges[4]), abs=0.06)
    assert float(cells["thorax_width"]) == pytest.approx(1000 * (edges[1] - edges[0]), abs=0.06)
    assert float(cells["cardiothoracic_ratio"]) == pytest.approx(compute_ratios([edges])[0], abs=6e-4)
