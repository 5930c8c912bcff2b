"""The networks of the papers."""

from fewstep.models.context import Context
from fewstep.models.conv import Conv4, ConvBlock
from fewstep.models.mlp import fully_connected, sinusoid_mlp

__all__ = ["Context", "Conv4", "ConvBlock", "fully_connected", "sinusoid_mlp"]
