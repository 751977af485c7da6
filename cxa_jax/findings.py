"""The fourteen findings of ChestX-ray14, in the order of every array that has one entry for each."""

import numpy as np

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
CARDIOMEGALY = FINDINGS.index("Cardiomegaly")
OTHERS = tuple(place for place in range(len(FINDINGS)) if place != CARDIOMEGALY)


def encode_findings(texts: np.ndarray) -> np.ndarray:
    """Return which findings each text names, int32 [N, 14] of 0 and 1; texts as in the records, 'Edema|Effusion'."""
    return np.array([[name in text.split("|") for name in FINDINGS] for text in texts], np.int32).reshape(
        -1, len(FINDINGS)
    )
