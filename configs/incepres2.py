"""CXA_IncepRes2 of Tables 4 and 5.

    python launch.py --config=configs/incepres2.py

Wall time on ChestX-ray14: many hours on one GPU. Test AUROC in the paper .85 (GAP .86).
Variants as in configs/dense121.py.
"""

from configs import common


def get_config(variants: str = ""):
    """Return the config; `variants` is what stands behind the colon of --config=configs/incepres2.py:VARIANTS."""
    return common.get_config("incepres2", "inception_resnet_v2", variants)
