"""CXA_Dense201 of Tables 4 and 5.

    python launch.py --config=configs/dense201.py

Wall time on ChestX-ray14: many hours on one GPU. Test AUROC in the paper .86 (GAP .84).
Variants as in configs/dense121.py.
"""

from configs import common


def get_config(variants: str = ""):
    """Return the config; `variants` is what stands behind the colon of --config=configs/dense201.py:VARIANTS."""
    return common.get_config("dense201", "densenet201", variants)
