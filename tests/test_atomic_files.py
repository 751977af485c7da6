"""Files that are there whole or not at all."""

import pytest

from cxa_jax.atomic_files import replace_when_written


def test_the_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with replace_when_written(path) as neighbour:
        neighbour.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writing_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with pytest.raises(OSError, match="no space"), replace_when_written(path) as neighbour:
        neighbour.write_text("ne")
        raise OSError("no space")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
