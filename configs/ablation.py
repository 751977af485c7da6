"""Several poolings, and strides if asked, with several seeds on the same images, then one table and one figure.

    python launch.py --mode=ablate --config=configs/ablation.py

The main job for each pooling and seed, one on each core, on the phantoms of phantom_quick: AMM and fair GAP (the same
head, the same batch norm), three seeds. --config.model.attended=normalized takes the norm from GAP again, and
--config.ablation.poolings=all takes all of cxa_jax.pooling.POOLINGS, a new one included.
--config.ablation.strides=32,16,8 trains each pooling at each stride, --config.ablation.rules=half_max,otsu tabulates
boxes by each rule.
On X-rays: --config=configs/ablation.py:nih_128, or other variants of configs/common.py in the place of phantom_quick.
"""

from configs import common


def get_config(variants: str = "phantom_quick"):
    """Return the config of one run and the section `ablation`; `variants` as in configs/dense121.py."""
    config = common.get_config("ablation", "densenet121", variants)
    config.ablation = common.ablation()
    config.model.attended = "all_normalized"  # one batch norm for all: the pooling alone differs
    return config
