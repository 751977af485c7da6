"""The networks: four backbones, and CardioXAttentionNet on top of any of them."""

from cxa_jax.models.backbones import BACKBONES
from cxa_jax.models.cxa import CardioXAttentionNet, create_model

__all__ = ["BACKBONES", "CardioXAttentionNet", "create_model"]
