"""CXA_Res50 of Tables 4 and 5.

    python launch.py --config=configs/res50.py

Wall time on ChestX-ray14: many hours on one GPU. Test AUROC in the paper .87 (GAP .86).
Variants as in configs/dense121.py.
"""

from configs import common


def get_config(variants: str = ""):
    """Return the config; `variants` is what stands behind the colon of --config=configs/res50.py:VARIANTS."""
    return common.get_config("res50", "resnet50", variants)
