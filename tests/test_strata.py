"""Which images a stratum holds."""

import numpy as np

from cxa_jax.strata import find_strata


def _split(labels, findings):
    strata = find_strata(np.array(labels), {"findings": np.array(findings)})
    return {(stratum.by, stratum.name): np.flatnonzero(stratum.mask).tolist() for stratum in strata}


def test_positives_alone_and_with_others():
    found = _split([1, 1, 0, 0], ["Cardiomegaly", "Cardiomegaly|Mass", "No Finding", ""])
    assert found == {("positives", "cardiomegaly alone"): [0, 2, 3], ("positives", "with other findings"): [1, 2, 3]}


def test_a_positive_of_which_nothing_is_told_has_no_other_findings():
    found = _split([1, 1, 0], ["Cardiomegaly|Mass", "", "No Finding"])
    assert found["positives", "with other findings"] == [0, 2]


def test_negatives_with_findings_are_split_from_those_without():
    found = _split([1, 0, 0, 0], ["Cardiomegaly|Mass", "nan", "Mass", "Edema|Mass"])
    assert found["negatives", "no finding"] == [0, 1]
    assert found["negatives", "other findings"] == [0, 2, 3]


def test_a_flipped_label_is_no_other_finding():
    # a phantom with label noise: drawn large, called a negative
    assert all(by == "positives" for by, _ in _split([1, 0, 0], ["Cardiomegaly", "Cardiomegaly", "No Finding"]))
