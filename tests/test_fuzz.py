"""Whatever a user brings ends in success or in one UserError that names it: no traceback, no hang, nothing left.

The long form, ten thousand cases and more, is slow; the short one runs a few of each kind.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import tempfile

import numpy as np
import pytest
import tiny
from absl import flags
from hostile_images import damage, image_files, make_bomb
from hostile_tables import CELLS, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from nih_tree import BOX_HEADER, BOXES, HEADER_2017, HEADER_V2020, IMAGES, label_line
from PIL import Image
from test_dicom import STORED
from test_dicom import write as write_dicom

import launch
from configs import common
from cxa_jax.boxes import check_boxes
from cxa_jax.data import chest_phantom, chestxray14, image_folder, input_images
from cxa_jax.data.folder_table import read_rows
from cxa_jax.data.images import GreyImage, load_grey, measure_image
from cxa_jax.data.input_files import list_inputs
from cxa_jax.data.nih_download import Download
from cxa_jax.data.nih_metadata import load_metadata
from cxa_jax.errors import UserError
from cxa_jax.predictions import read_predictions
from cxa_jax.run import create_run
from cxa_jax.trained_network import read_metrics, read_run_config
from cxa_jax.workdir import flatten_config

ROOT = pathlib.Path(__file__).parents[1]
LIMIT_S = 20  # a case that takes longer hangs
LONG = {"images": 3000, "dicom": 800, "nih": 2000, "folder": 1500, "inputs": 500, "predictions": 1500, "boxes": 300,
        "flags": 1200, "run_config": 500}  # fmt: skip
SHORT = 12


@contextlib.contextmanager
def place():
    """Yield a folder of its own for a case, whose path has a space and other letters, and end what hangs."""

    def give_up(*_):
        raise AssertionError(f"longer than {LIMIT_S} s")

    old = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="Ordner mit Wörtern ") as folder:
            yield pathlib.Path(folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def success_or_one_error(*names):
    """Let a UserError pass that has one of `names` in it; every other exception is a failure."""
    try:
        yield
    except UserError as error:
        message = str(error)
        assert any(str(name) in message for name in names), message
        assert "Traceback" not in message and len(message) < 4000


def check_image_file(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    with success_or_one_error(path):
        measure_image(path)
    with success_or_one_error(path):
        image = load_grey(path, 16)
        assert isinstance(image, GreyImage) and image.pixels.shape == (16, 16) and image.pixels.dtype == np.uint8
        assert image.width > 0 and image.height > 0
    (item,) = input_images.read_inputs([path], 16, 1)
    assert (item.image is None) == bool(item.error)


@given(st.data())
def check_images(data):
    with place() as folder:
        check_image_file(folder, *data.draw(image_files()))


DICOM_TAGS = {
    "NumberOfFrames": st.sampled_from(["1", "0", "-1", "3"]),
    "WindowCenter": st.sampled_from([0, 1e300, -1e300, [1, 2]]),
    "WindowWidth": st.sampled_from([0, 1, 1e-300, -5, 1e300]),
    "RescaleSlope": st.sampled_from([0, 1e30, -1, 1e-30]),
    "RescaleIntercept": st.sampled_from([0, 1e30, -1e9]),
    "Rows": st.sampled_from([0, 1, 65535]),
    "Columns": st.sampled_from([0, 1, 65535]),
    "SamplesPerPixel": st.sampled_from([0, 1, 3, 4]),
    "BitsAllocated": st.sampled_from([0, 1, 8, 16, 32, 64]),
    "PixelPaddingValue": st.sampled_from([0, 4095, 65535]),
    "PixelRepresentation": st.sampled_from([0, 1, 2]),
    "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "RGB", "YBR_FULL", "PALETTE COLOR", ""]),
}


@given(st.data())
def check_dicom(data):
    with place() as folder:
        tags = data.draw(st.dictionaries(st.sampled_from(sorted(DICOM_TAGS)), st.none(), max_size=3))
        values = {name: data.draw(DICOM_TAGS[name]) for name in tags}
        with contextlib.suppress(
            ValueError, TypeError, OverflowError, AttributeError, OSError
        ):  # pydicom does not write all
            write_dicom(
                folder / "a.dcm", STORED[:16, :20].copy(), bits=data.draw(st.sampled_from([8, 12, 16])), **values
            )
        written = (folder / "a.dcm").read_bytes() if (folder / "a.dcm").exists() else b""
        check_image_file(folder, data.draw(st.sampled_from(("b.dcm", "b", "b.png"))), data.draw(damage(written)))


def nih_rows():
    return [tuple(label_line(name, findings, patient).split(",")) for name, (findings, patient, _) in IMAGES.items()]


@st.composite
def nih_lists(draw, part):
    names = [name for name, (_, _, of) in IMAGES.items() if of == part]
    for _ in range(draw(st.integers(0, 2)) * draw(st.integers(0, 1))):
        match draw(st.sampled_from(("drop", "double", "strange", "text", "none"))):
            case "drop" if names:
                names.pop()
            case "double" if names:
                names.append(names[0])
            case "strange":
                names.append(draw(st.sampled_from(("00000099_000.png", "../../x", "a b"))))
            case "text":
                names.append(draw(st.text(max_size=8)))
            case "none":
                names = []
    return draw(st.sampled_from(("\n", "\r\n"))).join(names).encode("utf-8", "replace")


@given(st.data())
def check_nih(data):
    header = data.draw(st.sampled_from((HEADER_V2020, HEADER_2017)))
    boxes = [(name, "Cardiomegaly", *map(str, box)) for name, box in BOXES.items()]
    contents = {
        "Data_Entry_2017_v2020.csv": data.draw(tables(tuple(header.split(",")), nih_rows())),
        "BBox_List_2017.csv": data.draw(tables(tuple(BOX_HEADER.split(",")), boxes)),
        "train_val_list.txt": data.draw(nih_lists("train_val")),
        "test_list.txt": data.draw(nih_lists("test")),
    }
    with place() as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        lists = {part: folder / f"{part}_list.txt" for part in ("train_val", "test")}
        download = Download(folder / "Data_Entry_2017_v2020.csv", folder / "BBox_List_2017.csv", lists, {})
        with success_or_one_error(*(folder / name for name in contents)):
            metadata = load_metadata(download)
            assert {row.label for row in metadata.rows} <= {0, 1}
            assert all(math.isfinite(value) for row in metadata.rows for box in row.boxes for value in box)
            json.dumps(metadata.rows).encode()


FOLDER_ROWS = [(f"{n}.png", str(n % 2), f"p{n}", "", "", "PA", "F", "50") for n in range(6)]


@given(st.data())
def check_folder(data):
    options = common.get_config("x", "densenet121").data.folder
    for field in ("positive", "negative", "patient_regex"):
        if data.draw(st.integers(0, 9)) == 0:
            options[field] = data.draw(st.sampled_from(("(", "[", "a{1,99999999}", "", "x", "0", "1", "\0", "(a)|b")))
    with place() as folder:
        options.table = str(folder / "t.csv")
        for path, *_ in FOLDER_ROWS:
            Image.new("L", (4, 4)).save(folder / path)
        header = ("path", "label", "patient", "split", "boxes", "view", "sex", "age")
        (folder / "t.csv").write_bytes(data.draw(tables(header, FOLDER_ROWS)))
        with success_or_one_error(folder, "config.data.folder", "images have no patient"):
            for row in read_rows(folder, options):
                assert row.label in (0, 1) and row.path.is_file() and -1 <= row.age < 200
                assert all(math.isfinite(value) for box in row.boxes for value in box)
                row.id.encode()


@given(st.data())
def check_inputs(data):
    with place() as folder:
        Image.new("L", (4, 4)).save(folder / "a.png")
        (folder / "t.csv").write_bytes(data.draw(tables(("path", "note"), [("a.png", ""), ("b.png", "")])))
        with success_or_one_error(folder):
            for item in input_images.read_inputs(list_inputs([str(folder / "t.csv")]), 8, 1):
                assert (item.image is None) == bool(item.error)
        with success_or_one_error("--inputs"):
            list_inputs(data.draw(st.lists(st.sampled_from((*CELLS, "*.none", "[", "~nobody/x")), max_size=3)))


@given(st.data())
def check_predictions(data):
    header = ("id", "patient", "label", "logit", "score", "view")
    rows = [(f"i{n}", f"p{n}", str(n % 2), "0.5", "0.6", "PA") for n in range(4)]
    with place() as folder:
        path = folder / "theirs.csv"
        path.write_bytes(data.draw(tables(header, rows)))
        with success_or_one_error(path):
            table = read_predictions(path)
            assert len(table) and np.isin(table.label, (0, 1)).all() and ((table.score >= 0) & (table.score <= 1)).all()


@given(st.lists(st.lists(st.floats(width=64) | st.integers(-9, 99), min_size=3, max_size=5), max_size=4))
def check_box_lists(boxes):
    with success_or_one_error("boxes"):
        checked = check_boxes([box[:4] for box in boxes] if len({len(box) for box in boxes}) > 1 else boxes, 64, 64)
        assert np.isfinite(checked).all()


FIELDS = sorted(set(flatten_config(common.get_config("dense121", "densenet121"))) - {"name"})
VALUES = ("0", "-1", "1", "2", "7", "0.5", "-0.5", "1.5", "1e9", "1e300", "nan", "inf", "-inf", "True", "False",
          "None", "", "x", "all", "balanced", "patient", "gap", "pcam", "linear", "findings", "bfloat16",
          "resnet50", "smoothed", "image_folder", "1000000000", "99999999999999999999", "(1,2)", "(2,1)",
          "(0.7,1.3)", "('a',)", "[1]", "{}", "1,2", "../../x", "\0", "é ü", "__import__('os').system('true')",
          "lambda: 0")  # fmt: skip


@given(st.data())
def check_flags(data):
    """From the words of a command line to the run, all but its data."""
    overrides = data.draw(st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(VALUES)), min_size=1, max_size=3))
    unknown = data.draw(st.sampled_from((None,) * 9 + ("train.bach_size", "x", "data", "train.batch_size.x", "")))
    words = [f"--config.{field}={value}" for field, value in overrides + ([(unknown, "1")] if unknown else [])]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
    with place() as folder:
        try:
            values(["launch.py", f"--config={ROOT}/configs/dense121.py", *words])
            config = values.config
        except launch.CONFIG_ERRORS as error:
            assert str(error)
            return
        with success_or_one_error("config.", "class weights"):
            create_run(config, tiny.make_dataset())
        with config.unlocked():
            config.data.data_dir = str(folder)
        for module in (chest_phantom, chestxray14, image_folder):
            with success_or_one_error("config.data."):
                builder = module.create_builder(config.data)
                assert pathlib.Path(builder.data_path).is_relative_to(folder)
        assert not list(folder.rglob("*"))


@given(st.data())
def check_run_config(data):
    """config.json and metrics.json as someone's workdir may have them."""
    content = json.loads(common.get_config("dense121", "densenet121").to_json_best_effort())
    odd = st.sampled_from((None, 0, -1, "x", "../../x", [], {}, True, 1e300, [1, 2], {"a": 1}))
    for _ in range(data.draw(st.integers(0, 3))):
        section = data.draw(st.sampled_from(sorted(content)))
        node, field = content, section
        if isinstance(content[section], dict) and content[section] and data.draw(st.booleans()):
            node, field = content[section], data.draw(st.sampled_from(sorted(content[section])))
        if data.draw(st.integers(0, 4)) == 0:
            del node[field]
        else:
            node[field] = data.draw(odd)
        if not content:
            break
    text = data.draw(damage(json.dumps(content).encode()))
    with place() as folder:
        (folder / "config.json").write_bytes(text)
        with success_or_one_error(folder, "config."):
            config = read_run_config(folder)
            create_run(config, tiny.make_dataset())
        (folder / "metrics.json").write_bytes(text)
        with success_or_one_error(folder):
            read_metrics(folder)


CHECKS = {"images": check_images, "dicom": check_dicom, "nih": check_nih, "folder": check_folder,
          "inputs": check_inputs, "predictions": check_predictions, "boxes": check_box_lists,
          "flags": check_flags, "run_config": check_run_config}  # fmt: skip


def run_cases(check, number):
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=number, report_multiple_bugs=os.environ.get("FUZZ_ALL") == "1", **options)(check)()


@pytest.mark.parametrize("kind", CHECKS)
def test_a_few_cases(kind):
    run_cases(CHECKS[kind], SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_ten_thousand_cases(kind):
    assert sum(LONG.values()) >= 10_000 and LONG.keys() == CHECKS.keys()
    run_cases(CHECKS[kind], LONG[kind])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(None, marks=pytest.mark.slow),
        "BOM and CRLF",
        pytest.param("one doubled", marks=pytest.mark.slow),
        "one unknown finding",
    ],
)
def test_a_label_file_of_full_length(tmp_path, change):
    """112,120 rows, as NIH's has."""
    lines = [label_line(f"{n:08d}_000.png", "Cardiomegaly" if n % 40 == 0 else "No Finding", n) for n in range(112_120)]
    if change == "one doubled":
        lines[-1] = lines[0]
    if change == "one unknown finding":
        lines[100_000] = lines[100_000].replace("Cardiomegaly", "Cardiomegalie")
    text = "\n".join([HEADER_V2020, *lines]) + "\n"
    if change == "BOM and CRLF":
        text = "\ufeff" + text.replace("\n", "\r\n")
    (tmp_path / "labels.csv").write_bytes(text.encode())
    (tmp_path / "boxes.csv").write_text(BOX_HEADER + "\n")
    (tmp_path / "train_val.txt").write_text("\n".join(f"{n:08d}_000.png" for n in range(80_000)))
    (tmp_path / "test.txt").write_text("\n".join(f"{n:08d}_000.png" for n in range(80_000, 112_120)))
    lists = {part: tmp_path / f"{part}.txt" for part in ("train_val", "test")}
    download = Download(tmp_path / "labels.csv", tmp_path / "boxes.csv", lists, {})
    if change in (None, "BOM and CRLF"):
        assert len(load_metadata(download).rows) == 112_120
    else:
        line = {"one doubled": 112_121, "one unknown finding": 100_002}[change]
        with pytest.raises(UserError, match=f"labels.csv, line {line}"):
            load_metadata(download)


def test_bombs_end_before_they_unfold(tmp_path):
    for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "bomb.png").write_bytes(make_bomb(width, height, 8, 2))
        with pytest.raises(UserError, match=r"bomb\.png"):
            load_grey(tmp_path / "bomb.png", 8)
