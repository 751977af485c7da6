"""Files that are there whole or not at all."""

import errno

import pytest

from cxa_jax.atomic_files import remove_leftovers, replace_when_written


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


def test_a_full_disk_s_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left.*numbers.npz"), replace_when_written(tmp_path / "numbers.npz"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_killed_processes_left_is_told_from_other_files(tmp_path):
    for name in ("metrics.json.4711.tmp", "mine.tmp", "metrics.json"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "mine.tmp"]
