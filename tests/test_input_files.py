import pytest
from PIL import Image

from cxa_jax.data.input_files import list_inputs
from cxa_jax.errors import UserError


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.tiff", ".hidden.png"):
        Image.new("L", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub" / "IM0001").write_bytes(bytes(128) + b"DICM")
    return tmp_path


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_folder_takes_images_of_any_depth_and_nothing_else(tree, caplog):
    assert names(list_inputs([str(tree)]), tree) == ["a.JPG", "b.png", "sub/IM0001", "sub/c.tiff"]


def test_patterns_files_and_lists_in_the_order_named(tree):
    (tree / "list.csv").write_text("score,path\n1,sub/c.tiff\n2,missing.png\n")
    found = names(list_inputs([str(tree / "list.csv"), str(tree / "*.png"), str(tree / "**/*.tiff")]), tree)
    assert found == ["sub/c.tiff", "missing.png", "b.png"]
    (tree / "list.csv").write_text("Score, Path\n1,b.png\n")
    assert names(list_inputs([str(tree / "list.csv")]), tree) == ["b.png"]


def test_a_pattern_may_name_folders(tree):
    assert names(list_inputs([str(tree / "s*")]), tree) == ["sub/IM0001", "sub/c.tiff"]


def test_a_file_that_does_not_exist_stays_to_be_reported(tree):
    assert names(list_inputs([str(tree / "gone.png")]), tree) == ["gone.png"]


@pytest.mark.parametrize("content", ["file\na.png\n", "path\n", "path,x\n,1\n"])
def test_list_without_paths(tmp_path, content):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match="column `path`"):
        list_inputs([str(tmp_path / "list.csv")])


def test_nothing_named(tmp_path):
    for arguments in ([], [str(tmp_path)], [str(tmp_path / "*.png")]):
        with pytest.raises(UserError, match="no images"):
            list_inputs(arguments)
