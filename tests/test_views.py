"""Some views alone: the same rows in every split as a loop finds, other fingerprints, and what cannot be asked for."""

import dataclasses
import pickle

import numpy as np
import pytest
import saved_run
import tiny

from cxa_jax.data.datasets import load_dataset
from cxa_jax.data.views import describe_views, parse_views, select_views
from cxa_jax.errors import UserError
from cxa_jax.predict import _remark
from cxa_jax.trained_network import load_trained_network


def give_views(dataset, seed=3, choices=("AP", "PA", "")):
    rng = np.random.default_rng(seed)
    splits = {
        name: dataclasses.replace(split, index=split.index | {"view": rng.choice(choices, len(split.source))})
        for name, split in dataset.splits.items()
    }
    return dataclasses.replace(dataset, splits=splits)


@pytest.mark.parametrize("text", ["PA", "AP", "PA,AP", " AP, PA ,"])
def test_splits_hold_the_images_of_these_views(text):
    whole = give_views(tiny.make_dataset())
    some = select_views(whole, text)
    for name, split in whole.splits.items():
        rows = [row for row in range(len(split.source)) if split.index["view"][row] in parse_views(text)]
        found = some.splits[name]
        assert len(found.source) == len(rows) > 0
        for column, values in split.index.items():
            assert found.index[column].tolist() == [values[row] for row in rows], column
        for place, row in enumerate(rows):
            np.testing.assert_array_equal(found.read_image(place), split.read_image(row))
            assert found.source[place]["id"] == split.source[row]["id"]
    assert some.fingerprint != whole.fingerprint
    assert describe_views(text) in some.title and describe_views(text) in some.description


def test_the_order_of_the_names_changes_nothing():
    whole = give_views(tiny.make_dataset())
    assert select_views(whole, "PA,AP").fingerprint == select_views(whole, " AP, PA").fingerprint
    assert select_views(whole, "PA").fingerprint != select_views(whole, "AP").fingerprint
    assert select_views(whole, "") is whole and describe_views("") == ""


def test_a_selection_goes_to_other_processes():
    some = select_views(give_views(tiny.make_dataset()), "PA").splits["test"].source
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(some)).read_image(1), some.read_image(1))


def test_what_is_not_there_is_refused():
    whole = give_views(tiny.make_dataset())
    with pytest.raises(UserError, match=r"config.data.views='LL': no image is of the view 'LL'; there are AP, PA"):
        select_views(whole, "LL")
    with pytest.raises(UserError, match="know no views"):
        select_views(give_views(whole, choices=("",)), "PA")
    train = whole.splits["train"]
    for views, message in (
        (np.where(train.index["label"] == 1, "AP", "PA"), "one class alone in train"),
        (np.full(len(train.source), "AP"), "no image in train"),
    ):
        splits = whole.splits | {"train": dataclasses.replace(train, index=train.index | {"view": views})}
        with pytest.raises(UserError, match=message):
            select_views(dataclasses.replace(whole, splits=splits), "PA")


def test_the_config_names_them(tmp_path):
    """Of drawings, whose views are drawn with them; the prepared records stay as they are."""
    config = tiny.make_config()
    config.data.update(name="chest_phantom", data_dir=str(tmp_path), image_size=32)
    config.data.phantom.num_patients = 40
    whole = load_dataset(config.data)
    config.data.views = str(whole.splits["train"].index["view"][0])
    wanted = sum(view == config.data.views for view in whole.splits["test"].index["view"])
    assert len(load_dataset(config.data).splits["test"].source) == wanted
    config.data.views = "LL"
    with pytest.raises(UserError, match="no image is of the view 'LL'; there are "):
        load_dataset(config.data)


def test_predictions_say_what_the_network_knows(tmp_path):
    saved_run.save_run(tmp_path)
    network = load_trained_network(str(tmp_path))
    config = network.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.views = "PA"
    told = dataclasses.replace(network, config=config, is_phantom=False)
    assert _remark(told) == "The network was trained on PA views alone."
