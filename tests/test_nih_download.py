import os
import shutil

import numpy as np
import pytest
from nih_tree import TASK_IMAGES, make_download, write_images, write_labels, write_metadata
from PIL import Image

from cxa_jax.data import nih_download
from cxa_jax.errors import UserError


def test_parts_are_found_at_any_depth_and_in_several_folders(tmp_path):
    write_metadata(tmp_path / "a/b/meta")
    write_images(tmp_path / "c")
    for separator in (",", os.pathsep, " , "):
        folders = nih_download.parse_folders(f"{tmp_path / 'a'}{separator}{tmp_path / 'c'}")
        download = nih_download.find_download(folders)
        assert sorted(download.images) == TASK_IMAGES
        assert download.label_file == tmp_path / "a/b/meta/Data_Entry_2017_v2020.csv"


def test_a_folder_whose_name_holds_a_comma_is_one_folder(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert nih_download.parse_folders(str(folder)) == [folder]


def test_manual_dir_errors(tmp_path):
    with pytest.raises(UserError, match="config.data.manual_dir"):
        nih_download.parse_folders("")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        nih_download.parse_folders(f"{tmp_path},{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    "name", ["Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"]
)
def test_a_missing_part_is_named(tmp_path, name):
    make_download(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        nih_download.find_download([tmp_path])


def test_no_images_and_packed_images(tmp_path):
    write_metadata(tmp_path)
    with pytest.raises(UserError, match="no PNG below"):
        nih_download.find_download([tmp_path])
    (tmp_path / "images_001.tar.gz").touch()
    with pytest.raises(UserError, match="unpack"):
        nih_download.find_download([tmp_path])


def test_v2020_is_preferred_and_copies_count_once(tmp_path):
    make_download(tmp_path)
    write_labels(tmp_path, "2017")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "Data_Entry_2017_v2020.csv", tmp_path / "copy")
    assert nih_download.find_download([tmp_path]).label_file.name == "Data_Entry_2017_v2020.csv"
    (tmp_path / "copy/Data_Entry_2017_v2020.csv").write_text("changed")
    with pytest.raises(UserError, match="several different files could be Data_Entry"):
        nih_download.find_download([tmp_path])


def test_hidden_files_and_linked_loops_are_passed_over(tmp_path):
    make_download(tmp_path)
    (tmp_path / "images_001/images/._00000001_000.png").write_bytes(b"resource fork")
    (tmp_path / "images_001/loop").symlink_to(tmp_path, target_is_directory=True)
    download = nih_download.find_download([tmp_path, tmp_path / "images_001"])
    assert sorted(download.images) == TASK_IMAGES
    assert {len(places) for places in download.images.values()} == {1}


def test_the_first_of_equal_copies_is_taken_and_sizes_must_agree(tmp_path):
    for folder, size in (("b", 8), ("a", 8), ("c", 16)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / folder / "x.png")
    places = [tmp_path / folder / "x.png" for folder in "abc"]
    assert nih_download.choose_file(places[:2]) == places[0]
    with pytest.raises(UserError, match="several sizes"):
        nih_download.choose_file(places)


def test_fingerprint_tells_other_files_apart(tmp_path):
    make_download(tmp_path)

    def fingerprint() -> dict:
        download = nih_download.find_download([tmp_path])
        return nih_download.fingerprint(download, {name: places[0] for name, places in download.images.items()})

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "test_list.txt").write_text("00000009_000.png\n")
    next(tmp_path.glob("images_001/images/*.png")).unlink()
    after = fingerprint()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"test_list_sha256", "num_images", "image_names_and_lengths_sha256"}
