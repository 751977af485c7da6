"""Cardio-XAttentionNet in JAX. A trained network in three lines:

import cxa_jax
network = cxa_jax.load_weights("nih128")
out = network.predict(images)  # uint8 [B, H, W]: 'logit', 'score', 'attention', ...
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxa_jax.trained_network import TrainedNetwork


def load_weights(weights: str) -> "TrainedNetwork":
    """Load a trained network, ready to look at images; see `trained_network.TrainedNetwork.predict`.

    Args:
      weights: name of one in weights/, such as 'nih128'; a file that --mode=export wrote; or a workdir.

    Raises:
      UserError: there is no such network, its file is not the one that its digest is of, or it cannot be read.
    """
    from cxa_jax import weights as weights_module  # here: it loads jax, and `import cxa_jax` alone does not

    return weights_module.load_weights(weights)
