"""The networks of the papers."""

from fewstep.models.conv import Conv4, ConvBlock
from fewstep.models.mlp import fully_connected, sinusoid_mlp

__all__ = ["Conv4", "ConvBlock", "fully_connected", "sinusoid_mlp"]
