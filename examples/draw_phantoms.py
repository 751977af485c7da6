"""Draw chest phantoms as files, to try commands on: python examples/draw_phantoms.py FOLDER [NUM_PATIENTS]

Writes FOLDER/labelled/CLASS/pPATIENT_IMAGE.png, FOLDER/labels.csv with path, label, patient and the heart's box, and in
FOLDER/odd a DICOM file and images that predict warns of. The drawings are no X-rays of patients.
"""

import csv
import pathlib
import sys

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cxa_jax.data.phantom import PhantomSpec, num_images
from cxa_jax.data.phantom_render import draw

SPEC = PhantomSpec(preset="hard", prevalence=0.4, label_noise=0.0, seed=2023)  # the configs' phantoms have seed 0
SIZE = 256  # px


def main(folder: pathlib.Path, num_patients: int = 40) -> None:
    """Draw labelled images of `num_patients` patients, and the odd ones, into `folder`."""
    rows = [("path", "label", "patient", "boxes")]
    for patient in range(num_patients):
        for image in range(num_images(SPEC, patient)):
            drawing = draw(SPEC, SIZE, (patient, image))
            kind = "cardiomegaly" if drawing.latents.label else "no_finding"
            path = pathlib.Path(kind) / f"p{patient:04d}_{image}.png"
            box = " ".join(map(str, drawing.box)) if drawing.latents.label else ""
            rows.append((path.as_posix(), kind, f"p{patient:04d}", box))
            save(folder / "labelled" / path, drawing.image)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    pixels = draw(SPEC, SIZE, (num_patients, 0)).image
    save(folder / "odd" / "inverted.png", 255 - pixels)
    save(folder / "odd" / "upside_down.png", pixels[::-1])
    save(folder / "odd" / "blank.png", np.full_like(pixels, 90))
    save(folder / "odd" / "strip.png", pixels[100:180])
    (folder / "odd" / "cut.png").write_bytes((folder / "odd" / "inverted.png").read_bytes()[:9000])
    save_dicom(folder / "odd" / "monochrome1_12bit.dcm", 4095 - 16 * pixels.astype(np.uint16))
    print(f"{len(rows) - 1} labelled images of {num_patients} patients, and six odd files, in {folder}")


def save(path: pathlib.Path, pixels: np.ndarray) -> None:
    """Write a PNG, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_dicom(path: pathlib.Path, stored: np.ndarray) -> None:
    """Write 12-bit MONOCHROME1, 0 = white, with a window over its whole range."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.ViewPosition, dataset.PhotometricInterpretation = "DX", "PA", "MONOCHROME1"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = stored.tobytes()
    dataset.save_as(path, enforce_file_format=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
