"""CXA_Dense121, the paper's best model (Tables 4, 5).

    python launch.py --config=configs/dense121.py

Wall time on ChestX-ray14: hours on one GPU. Test AUROC in the paper .89; see docs/reproduction.md for what to expect.
Variants (comma-separated): gap, gap_mlp, phantom_quick, phantom_hour, research, nih_128, torch_recipe, stride16,
stride8; see configs/common.py.
"""

from configs import common


def get_config(variants: str = ""):
    """Return the config; `variants` is what stands behind the colon of --config=configs/dense121.py:VARIANTS."""
    return common.get_config("dense121", "densenet121", variants)
