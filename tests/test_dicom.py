"""DICOM as a viewer shows it, against the standard's formulas; and never a word about the patient."""

import pathlib

import numpy as np
import pydicom
import pytest
from pydicom import pixels
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from cxa_jax.data.dicom import NOT_FRONTAL, NOT_RADIOGRAPH
from cxa_jax.data.images import load_grey, read_grey
from cxa_jax.errors import UserError

SECRET = "DOE^JANE"
TEST_FILES = pathlib.Path(pydicom.__file__).parent / "data" / "test_files"
STORED = np.random.default_rng(0).integers(0, 4096, (64, 80)).astype(np.uint16)
UNKNOWN_VR = b"\x08\x00\x60\x00CS", b"\x08\x00\x60\x00C\xe2"
FRAMES = b"\x28\x00\x08\x00IS\x02\x0011", b"\x28\x00\x08\x00IS\x02\x001A"


def write(path, stored=STORED, *, photometric="MONOCHROME2", bits=12, modality="DX", syntax=None, **tags):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PatientName, dataset.PatientID = SECRET, SECRET
    dataset.SOPClassUID = dataset.SOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    dataset.file_meta.MediaStorageSOPClassUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID
    dataset.Modality, dataset.PhotometricInterpretation = modality, photometric
    dataset.Rows, dataset.Columns = stored.shape[-2:] if stored.ndim == 2 else stored.shape[:2]
    dataset.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * stored.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax is not None:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
    return path


def window(values, center, width, low=0.0, high=4095.0):
    """DICOM PS3.3 C.11.2.1.2.1, linear."""
    unit = (values - (center - 0.5)) / (width - 1) + 0.5
    return 255 * np.clip(unit, 0, 1) * (high - low) / (high - low)


def test_window(tmp_path):
    grey, mode, notes = read_grey(write(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=1000))
    assert grey.dtype == np.uint8 and mode == "DICOM MONOCHROME2 12-bit" and notes == ()
    assert np.abs(grey - window(STORED.astype(float), 2000, 1000)).max() <= 0.51


def test_first_window_after_rescale(tmp_path):
    path = write(
        tmp_path / "a.dcm", WindowCenter=[500, 1], WindowWidth=[800, 2], RescaleSlope=2, RescaleIntercept=-1000
    )
    expected = window(2.0 * STORED - 1000, 500, 800)
    assert np.abs(read_grey(path)[0] - expected).max() <= 0.51


def test_without_window_the_pixels_range_counts(tmp_path):
    stored = (STORED // 4 + 300).astype(np.uint16)
    expected = 255.0 * (stored - stored.min()) / (stored.max() - stored.min())
    assert np.abs(read_grey(write(tmp_path / "a.dcm", stored))[0] - expected).max() <= 0.51


def test_signed_and_sixteen_bits(tmp_path):
    stored = (STORED.astype(np.int32) * 16 - 32768).astype(np.int16)
    expected = 255.0 * (stored.astype(float) - stored.min()) / (int(stored.max()) - int(stored.min()))
    assert np.abs(read_grey(write(tmp_path / "a.dcm", stored, bits=16))[0] - expected).max() <= 0.51


def test_monochrome1_is_inverted_and_padding_is_black(tmp_path):
    stored = STORED.copy()
    stored[:3] = 4095
    shown = {"WindowCenter": 2000, "WindowWidth": 3000, "PixelPaddingValue": 4095}
    plain = read_grey(write(tmp_path / "2.dcm", stored, **shown))[0]
    inverted = read_grey(write(tmp_path / "1.dcm", stored, photometric="MONOCHROME1", **shown))[0]
    np.testing.assert_array_equal(inverted[3:], np.where(stored[3:] == 4095, 0, 255 - plain[3:].astype(int)))
    assert not plain[:3].any() and not inverted[:3].any()


def test_voi_lut_wins_over_window(tmp_path):
    lut = Dataset()
    table = (np.linspace(0, 1, 4096) ** 2 * 1023).astype(np.uint16)
    lut.LUTDescriptor, lut.LUTData = [4096, 0, 10], table.tobytes()
    lut.add_new(0x00283006, "OW", table.tobytes())
    path = write(tmp_path / "a.dcm", VOILUTSequence=[lut], WindowCenter=1, WindowWidth=2)
    assert np.abs(read_grey(path)[0] - 255.0 * table[STORED] / 1023).max() <= 0.51


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_pixels_are_the_same(tmp_path, syntax):
    plain = read_grey(write(tmp_path / "a.dcm"))[0]
    np.testing.assert_array_equal(read_grey(write(tmp_path / "b.dcm", syntax=syntax))[0], plain)


def test_an_rle_segment_that_is_too_long_ends_no_process(tmp_path):
    """pylibjpeg-rle's decoder panics on it, past every `except Exception`."""
    plain = read_grey(write(tmp_path / "a.dcm"))[0]
    path = damaged(write(tmp_path / "b.dcm", syntax=RLELossless), lambda raw: raw[:-900] + 800 * b"\x81" + raw[-100:])
    assert np.abs(read_grey(path)[0].astype(int) - plain).max() <= 16  # the damage is in the low bytes' last rows


def test_jpeg_lossless_family(tmp_path):
    plain = read_grey(TEST_FILES / "MR_small.dcm")[0]
    for name in ("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_bigendian"):
        np.testing.assert_array_equal(read_grey(TEST_FILES / f"{name}.dcm")[0], plain)


def test_colour_is_luminance_and_noted(tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    grey, _, notes = read_grey(write(tmp_path / "a.dcm", colour, photometric="RGB", bits=8))
    assert np.abs(grey - colour @ np.array([0.299, 0.587, 0.114])).max() <= 0.51
    assert "colour" in notes[0]


def test_tags_that_speak_against_the_image(tmp_path):
    assert read_grey(write(tmp_path / "a.dcm", modality="CT"))[2] == (NOT_RADIOGRAPH,)
    assert read_grey(write(tmp_path / "b.dcm", ViewPosition="LL"))[2] == (NOT_FRONTAL,)
    assert read_grey(write(tmp_path / "c.dcm", ViewPosition="PA"))[2] == ()


def test_a_dicom_is_known_by_its_first_bytes(tmp_path):
    path = write(tmp_path / "IM0001")
    assert load_grey(path, 10).mode.startswith("DICOM") and load_grey(path, 10).width == 80


def damaged(path, change):
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("2 frames", lambda path: write(path, np.stack([STORED, STORED])[0].repeat(2, 0), NumberOfFrames=2)),
        ("photometric", lambda path: write(path, photometric="PALETTE COLOR")),
        ("damaged", lambda path: damaged(write(path, NumberOfFrames=11), lambda raw: raw.replace(*FRAMES))),
        ("damaged", lambda path: damaged(write(path), lambda raw: raw[:-100])),
        ("without an image", lambda path: damaged(write(path), lambda raw: b"nothing" * 30)),
        ("damaged", lambda path: write(path, WindowCenter=10, WindowWidth=0)),
        ("damaged", lambda path: damaged(write(path), lambda raw: raw.replace(*UNKNOWN_VR))),
        (
            "damaged",
            lambda path: damaged(
                write(path, syntax=RLELossless), lambda raw: raw[:-2600] + 2500 * b"\x80" + raw[-100:]
            ),
        ),
    ],
)
def test_refused_without_quoting_the_patient(tmp_path, message, make):
    path = make(tmp_path / "a.dcm")
    with pytest.raises(UserError, match=message) as caught:
        read_grey(path)
    assert SECRET not in str(caught.value) and "JANE" not in str(caught.value)


def test_missing_plugin_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.dcm", syntax=RLELossless)
    monkeypatch.setattr(type(pixels.get_decoder(RLELossless)), "is_available", False)
    with pytest.raises(UserError, match="RLE Lossless; pip install pylibjpeg"):
        read_grey(path)
