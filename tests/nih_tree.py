"""A small download in the NIH layout, for the tests of its reader and builder."""

import pathlib

import numpy as np
from PIL import Image

HEADER_V2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
HEADER_2017 = HEADER_V2020 + ","
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
# name: (findings, patient, list). Of the task: training 4 positives + 8 negatives, test 2 + 2.
IMAGES = {f"{p:08d}_{i:03d}.png": ("No Finding", p, "train_val") for p in (1, 2, 3, 4) for i in (0, 1)}
IMAGES |= {f"{p:08d}_000.png": ("Cardiomegaly", p, "train_val") for p in (5, 6, 7)}
IMAGES |= {
    "00000001_002.png": ("Cardiomegaly|Effusion", 1, "train_val"),
    "00000008_000.png": ("Effusion|Mass", 8, "train_val"),
    "00000009_000.png": ("Cardiomegaly", 9, "test"),
    "00000009_001.png": ("Cardiomegaly|Mass", 9, "test"),
    "00000010_000.png": ("No Finding", 10, "test"),
    "00000011_000.png": ("No Finding", 11, "test"),
}
TASK_IMAGES = sorted(name for name, (findings, _, _) in IMAGES.items() if findings != "Effusion|Mass")
BOXES = {"00000009_000.png": (256.0, 512.0, 128.0, 64.0)}


def label_line(name: str, findings: str, patient: int, age: str = "58") -> str:
    return f"{name},{findings},0,{patient},{age},F,PA,2500,2048,0.168,0.168"


def write_labels(folder: pathlib.Path, version: str = "v2020") -> pathlib.Path:
    header, age, stem = {
        "v2020": (HEADER_V2020, "58", "Data_Entry_2017_v2020"),
        "2017": (HEADER_2017, "058Y", "Data_Entry_2017"),
    }[version]
    path = folder / f"{stem}.csv"
    lines = [label_line(name, findings, patient, age) for name, (findings, patient, _) in IMAGES.items()]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_metadata(folder: pathlib.Path, version: str = "v2020") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_labels(folder, version)
    for part in ("train_val", "test"):
        names = [name for name, (_, _, of) in IMAGES.items() if of == part]
        (folder / f"{part}_list.txt").write_text("\n".join(names) + "\n")
    boxes = [f"{name},Cardiomegaly,{','.join(map(str, box))}" for name, box in BOXES.items()]
    other = "00000001_000.png,Infiltrate,1.0,2.0,3.0,4.0"
    (folder / "BBox_List_2017.csv").write_text("\n".join([BOX_HEADER, other, *boxes]) + "\n")


def write_images(folder: pathlib.Path, size: int = 64, names: list[str] = TASK_IMAGES) -> dict[str, np.ndarray]:
    """Write 8-bit grey PNGs into images_001/images/ and images_002/images/ and return their pixels."""
    rng = np.random.default_rng(5)
    pixels = {name: rng.integers(0, 256, (size, size), np.uint8) for name in sorted(names)}
    for number, (name, image) in enumerate(pixels.items()):
        place = folder / f"images_00{1 + number % 2}" / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / name)
    return pixels


def make_download(folder: pathlib.Path, size: int = 64) -> dict[str, np.ndarray]:
    """Write a whole download and return the pixels of its images."""
    write_metadata(folder)
    return write_images(folder, size)
