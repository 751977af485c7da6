"""docs/amm.md: its tests exist, its links lead somewhere, its figures can be drawn, its example runs."""

import ast
import functools
import importlib.util
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cxa_jax.models import CardioXAttentionNet
from cxa_jax.pooling import POOLINGS

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs/amm.md").read_text()
LINKED_TESTS = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/test_\w+\.py)\)", TEXT)


def load(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem + "_of_the_docs", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def list_tests(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_statement_links_to_a_test_that_exists():
    assert len(set(LINKED_TESTS)) >= 50
    for name, path in LINKED_TESTS:
        assert name in list_tests(path), (name, path)
    assert {name for name, _ in LINKED_TESTS} == set(re.findall(r"`(test_\w+)`", TEXT))  # none is named without a link


def test_every_section_is_linked_to_tests():
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert len(sections) == 9 and all("](../tests/test_" in section for section in sections)
    for arrow in re.split("→ ", TEXT)[2:]:
        assert arrow.startswith("[`test_"), arrow[:60]


def test_every_test_of_the_mathematics_is_linked():
    mathematics = list_tests("tests/test_pooling.py") | list_tests("tests/test_attention_graph.py")
    mathematics |= list_tests("tests/test_pooling_family.py")
    mathematics |= {name for name in list_tests("tests/test_evidence.py") if "evidence" in name or "cam" in name}
    assert mathematics - {name for name, _ in LINKED_TESTS} == set()


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / "docs" / link).resolve().is_file(), link


def test_every_row_is_a_pooling():
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert {"amm", "softmax", "gated", "pcam", "gap", "gmp", "lse", "gem", "topk"} <= rows <= set(POOLINGS)


def test_figures_are_drawn_by_the_script(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib's own imports
        load("docs/make_figures.py").main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"\]\(figures/(\w+\.png)\)", TEXT))
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


@pytest.fixture
def example(monkeypatch):
    """Run the code of section 8 and return the name it adds to POOLINGS; gone again after the test."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(block.strip().splitlines()) <= 20
    before = set(POOLINGS)
    monkeypatch.setitem(POOLINGS, "sparsemax", None)  # so that the entry is removed at the end
    exec(compile(block, "docs/amm.md", "exec"), {})
    (name,) = set(POOLINGS) - before
    return name


def test_the_example_passes_the_sweep(example):
    family = load("tests/test_pooling_family.py")
    swept = 0
    for name, test in vars(family).items():
        marks = [mark.args for mark in getattr(test, "pytestmark", [])]
        if name.startswith("test_") and any(mark[1] == sorted(POOLINGS) for mark in marks):
            others = {mark[0]: mark[1][0] for mark in marks if mark[0] != "name"}
            test(name=example, **others)
            swept += 1
    assert swept >= 8


def test_the_example_is_sparse(example):
    logits = np.random.default_rng(0).normal(size=(2, 7, 7, 1)).astype(np.float32)
    pooled, p = POOLINGS[example](jnp.ones((2, 7, 7, 3)), jnp.asarray(logits))
    np.testing.assert_allclose(pooled, 1, rtol=1e-5)
    assert 0 < np.count_nonzero(p[0]) < 25
    threshold = np.max(logits - np.asarray(p), axis=(1, 2), where=np.asarray(p) > 0, initial=-np.inf)
    np.testing.assert_allclose(p, np.maximum(logits - threshold[:, None, None], 0), atol=1e-6)


def test_the_example_trains_with_the_attention_branch(example):
    images = jnp.zeros((2, 64, 64, 3))
    for name, branched in ((example, True), ("gap", False)):
        model = CardioXAttentionNet(tiny.BACKBONES["tiny"](), pooling=name)
        variables = jax.eval_shape(lambda model=model: model.init(jax.random.key(0), images))
        assert ("amm" in variables["params"]) == branched
