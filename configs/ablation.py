"""Several poolings with several seeds on the same images, then one table and one figure.

    python launch.py --mode=ablate --config=configs/ablation.py

The main job for each pooling and seed, one on each core, on phantoms of 64 px: AMM and fair GAP, softmax attention and
log-sum-exp, three seeds, under 40 minutes on two cores. --config.ablation.poolings=all takes all of
cxa_jax.pooling.POOLINGS, a new one included, in about 90. docs/results.md has the table.
On X-rays: --config=configs/ablation.py:nih_128, or other variants of configs/common.py in the place of phantom_small.
"""

from configs import common


def get_config(variants: str = "phantom_small"):
    """Return the config of one run and the section `ablation`; `variants` as in configs/dense121.py."""
    config = common.get_config("ablation", "densenet121", variants)
    config.ablation = common.ablation()
    return config
