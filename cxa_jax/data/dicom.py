"""DICOM X-rays as 8-bit grey, as a viewer shows them. Reads no tag that says who the patient is."""

import logging
import os
import struct
import warnings

import numpy as np
import pydicom
from PIL import Image
from pydicom import pixels
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import RLELossless

from cxa_jax.errors import UserError

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its log, like its warnings, quotes values

RADIOGRAPHS = ("CR", "DX", "DR", "RG", "RF", "XA")  # modalities that a projection X-ray may carry
FRONTAL_VIEWS = ("AP", "PA", "")
NOT_RADIOGRAPH = "its DICOM modality is not that of an X-ray"
NOT_FRONTAL = "its DICOM view position is not PA or AP"

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings may quote what stands in a tag

# All that is ever parsed: pixels, how to show them, and two words on what they are. Names, dates and numbers of the
# patient stay unread, so they cannot get into a message.
_TAGS = [
    "BitsAllocated", "BitsStored", "Columns", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "HighBit",
    "Modality", "ModalityLUTSequence", "NumberOfFrames", "PhotometricInterpretation", "PixelData",
    "PixelPaddingRangeLimit", "PixelPaddingValue", "PixelRepresentation", "PlanarConfiguration", "RescaleIntercept",
    "RescaleSlope", "RescaleType", "Rows", "SamplesPerPixel", "SOPClassUID", "ViewPosition", "VOILUTFunction",
    "VOILUTSequence", "WindowCenter", "WindowWidth",
]  # fmt: skip
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# What pydicom and its plugins raise for pixels or display tags that are cut, altered or contradictory.
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, BytesLengthException, EOFError, IndexError, KeyError,
           MemoryError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError, struct.error)  # fmt: skip


def read_dicom(path: str | os.PathLike) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Read one single-frame DICOM image as 8-bit grey, white = dense.

    The modality LUT or rescale is applied, then the first VOI LUT, else the first window; its range becomes 0-255.
    Without either the range is that of the pixels (padding left out). MONOCHROME1 is inverted. Padding becomes 0.

    Args:
      path: the file; any transfer syntax that pydicom or an installed plugin decodes.

    Returns:
      Pixels uint8 [H, W], grey, or [H, W, 3] for colour; the mode, such as 'DICOM MONOCHROME1 12-bit'; notes: what its
      tags say against it.

    Raises:
      UserError: not DICOM, no pixels, several frames, an unknown kind of pixels, damage, or a missing plugin. The
        message quotes no tag.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values
        dataset = _open(path)
        try:
            photometric = _check(path, dataset)
            if dataset.file_meta.TransferSyntaxUID == RLELossless:
                dataset.pixel_array_options(decoding_plugin="pydicom")  # pylibjpeg-rle panics on damage
            stored = dataset.pixel_array
            values = stored if photometric in _COLOUR else _show(stored, dataset, photometric == "MONOCHROME1")
            mode, notes = f"DICOM {photometric} {int(dataset.BitsStored)}-bit", _note_tags(dataset)
        except UserError:  # itself a ValueError
            raise
        except _DAMAGE as error:
            raise UserError(f"{path}: its DICOM tags or pixels are damaged ({type(error).__name__})") from None
    if 0 in values.shape or values.ndim != (3 if photometric in _COLOUR else 2) or values.shape[2:] not in ((), (3,)):
        raise UserError(f"{path}: its DICOM tags and pixels contradict each other")
    if values.dtype != np.uint8:
        raise UserError(f"{path}: DICOM colour of more than 8 bits is not read")
    return values, mode, notes


def to_luminance(rgb: np.ndarray) -> np.ndarray:
    """Return the luminance uint8 [H, W] (ITU-R 601) of colour uint8 [H, W, 3]."""
    return np.asarray(Image.fromarray(rgb).convert("L"))


def _open(path: str | os.PathLike) -> Dataset:
    try:
        # force: some archives leave out the preamble; what is then no DICOM has no pixels either
        return pydicom.dcmread(path, force=True, specific_tags=_TAGS)
    except (InvalidDicomError, *_DAMAGE) as error:
        raise UserError(f"{path}: cannot be read as DICOM ({type(error).__name__})") from None


def _check(path: str | os.PathLike, dataset: Dataset) -> str:
    """Refuse what is no single image of a known kind; return its photometric interpretation."""
    if "PixelData" not in dataset or "Rows" not in dataset:
        raise UserError(f"{path}: a DICOM file without an image, or no DICOM file")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise UserError(f"{path}: a DICOM file of {int(dataset.NumberOfFrames)} frames; give one image a file")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric not in (*_GREY, *_COLOUR):
        raise UserError(f"{path}: its DICOM photometric interpretation is none of {', '.join((*_GREY, *_COLOUR))}")
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None:
        raise UserError(f"{path}: a DICOM file that does not name its transfer syntax")
    try:
        decoder = None if not syntax.is_compressed else pixels.get_decoder(syntax)
    except (NotImplementedError, ValueError):
        raise UserError(f"{path}: DICOM transfer syntax {syntax.name} is none that pydicom knows for images") from None
    if decoder is not None and not decoder.is_available:
        raise UserError(
            f"{path}: no installed plugin decodes DICOM transfer syntax {syntax.name}; "
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        )
    return photometric


def _show(stored: np.ndarray, dataset: Dataset, inverted: bool) -> np.ndarray:
    padding = _find_padding(stored, dataset)
    values = pixels.apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        shown = pixels.apply_voi_lut(np.rint(values).astype(np.int64), dataset, prefer_lut=True)
        low, high = 0.0, 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif _has_window(dataset):
        shown = pixels.apply_windowing(np.asarray(values, np.float64), dataset)
        with np.errstate(over="ignore"):  # of a sigmoid: far out is where it reaches its ends
            low, high = pixels.apply_windowing(np.array([-1e9, 1e9]), dataset)
    else:
        shown = values
        low, high = (float(f(values[~padding])) if not padding.all() else 0.0 for f in (np.min, np.max))
    unit = (np.asarray(shown, np.float64) - low) / (high - low) if high != low else np.zeros(shown.shape)
    grey = np.rint(255 * np.clip(unit, 0, 1)).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _note_tags(dataset: Dataset) -> tuple[str, ...]:
    notes = (NOT_RADIOGRAPH,) if str(dataset.get("Modality", "")) not in RADIOGRAPHS else ()
    return notes if str(dataset.get("ViewPosition", "") or "") in FRONTAL_VIEWS else (*notes, NOT_FRONTAL)


def _has_window(dataset: Dataset) -> bool:
    return all(dataset.get(tag) not in (None, "", []) for tag in ("WindowCenter", "WindowWidth"))


def _find_padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit")
    last = first if last is None else last
    return (stored >= min(first, last)) & (stored <= max(first, last))
