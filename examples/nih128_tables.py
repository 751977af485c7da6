"""Tables of the trainings of weights/nih128: ChestX-ray14 at 128 px, images with names and images without.

    python examples/nih128_tables.py FOLDER METADATA.csv RAW_FOLDERS...

FOLDER holds the images in one look and table.csv with path, label, patient, split, source ('named' or another),
findings, view, boxes; METADATA.csv is NIH's Data_Entry_2017_v2020.csv; RAW_FOLDERS hold the named images as NIH ships
them, at 128 px. Needs scikit-learn. It writes, beside table.csv,

* all.csv: every image. Images without names have no view: a logistic regression on 24x24 thumbnails, fitted to named
  training images, says it. Dev is drawn from the patients of named training images, 15 % of those with cardiomegaly
  and 10 % of the others;
* pa.csv: PA views, without the images whose view is estimated by a narrow margin;
* rawall.csv: as all.csv, but named images as they are, copied to raw/. The view of images without names is one of its
  own, so that config.data.strata=view draws negatives in the positives' shares of source and view, and neither tells
  the label.
"""

import argparse
import csv
import pathlib
import shutil

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

THUMBNAIL_PX = 24
RIDGE = 0.01  # scikit-learn's C
NARROW = 0.5  # margin in logits
DEV_SHARES = 0.15, 0.10  # of patients with, without cardiomegaly
MAX_AGE = 120  # years; NIH's few ages beyond are errors
COLUMNS = ("path", "label", "patient", "split", "boxes", "view", "sex", "age")


def read_thumbnail(path: pathlib.Path) -> np.ndarray:
    """Return a thumbnail of mean 0 and sd 1, float32 [576]."""
    with Image.open(path) as image:
        small = np.asarray(image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX), np.float32).ravel()
    return (small - small.mean()) / (small.std() + 1e-6)


def estimate_views(rows: list[dict[str, str]], folder: pathlib.Path) -> np.ndarray:
    """Return the margin of AP over PA, in logits, of each row; prints how well it tells views of other patients."""
    images = np.stack([read_thumbnail(folder / row["path"]) for row in rows])
    is_ap = np.array([row["view"] == "AP" for row in rows], int)
    known = np.array([row["source"] == "named" and row["split"] == "train" for row in rows])
    patients = np.array([row["patient"] for row in rows])
    model = LogisticRegression(C=RIDGE, max_iter=2000)
    options = {"groups": patients[known], "cv": GroupKFold(5), "method": "decision_function"}
    held_out = cross_val_predict(model, images[known], is_ap[known], **options)
    margin = model.fit(images[known], is_ap[known]).decision_function(images)
    test = np.array([row["split"] == "test" for row in rows])
    print(f"AP against PA, AUROC: {roc_auc_score(is_ap[known], held_out):.3f} by five folds of patients, "
          f"{roc_auc_score(is_ap[test], margin[test]):.3f} on test")  # fmt: skip
    return margin


def draw_dev(rows: list[dict[str, str]], seed: int = 0) -> set[str]:
    """Return dev's patients."""
    train = [row for row in rows if row["source"] == "named" and row["split"] == "train"]
    positive = {row["patient"] for row in train if row["label"] == "cardiomegaly"}
    others = {row["patient"] for row in train} - positive
    rng, dev = np.random.default_rng(seed), set()
    for patients, share in zip((positive, others), DEV_SHARES, strict=True):
        dev |= set(rng.permutation(sorted(patients))[: int(len(patients) * share + 1e-9)])
    return dev


def write_table(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    """Write one table and say what is in it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for split in ("train", "dev", "test"):
        labels = [row["label"] == "cardiomegaly" for row in rows if row["split"] == split]
        print(f"{path.name}, {split}: {sum(labels)} positive of {len(labels)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("metadata", type=pathlib.Path)
    parser.add_argument("raw_folders", type=pathlib.Path, nargs="+")
    given = parser.parse_args()
    with (given.folder / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with given.metadata.open(newline="", encoding="utf-8") as file:
        metadata = {row["Image Index"]: row for row in csv.DictReader(file)}
    dev, margins = draw_dev(rows), estimate_views(rows, given.folder)
    for row, margin in zip(rows, margins, strict=True):
        known = metadata.get(pathlib.PurePosixPath(row["path"]).name, {})
        row["sex"] = known.get("Patient Gender", "")
        row["age"] = str(min(int(known["Patient Age"]), MAX_AGE)) if known else ""
        if row["source"] != "named":
            row["view"] = "AP" if margin > 0 else "PA"
        if row["split"] == "train" and row["patient"] in dev:
            row["split"] = "dev"
    write_table(given.folder / "all.csv", rows)
    clear = [row["source"] == "named" or abs(margin) >= NARROW for row, margin in zip(rows, margins, strict=True)]
    write_table(
        given.folder / "pa.csv",
        [row for row, is_clear in zip(rows, clear, strict=True) if is_clear and row["view"] == "PA"],
    )
    (given.folder / "raw").mkdir(exist_ok=True)
    for row in rows:
        if row["source"] != "named":
            row["view"] = f"{row['source']} {row['view']}"
            continue
        name = pathlib.PurePosixPath(row["path"]).name
        found = [folder / name for folder in given.raw_folders if (folder / name).is_file()]
        if not found:
            parser.error(f"{name} is in none of RAW_FOLDERS")
        shutil.copy(found[0], given.folder / "raw" / name)
        row["path"] = f"raw/{name}"
    write_table(given.folder / "rawall.csv", rows)


if __name__ == "__main__":
    main()
