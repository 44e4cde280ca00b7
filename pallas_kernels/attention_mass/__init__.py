"""How much attention each token receives from text and from visual queries."""

from pallas_kernels.attention_mass.api import attention_mass
from pallas_kernels.attention_mass.reference import BLOCK

__all__ = ["BLOCK", "attention_mass"]
