"""The networks as settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fewstep.core.errors import InputError
from fewstep.models.conv import Activation, Conv4, Downsample, Head, Initialisation, Norm
from fewstep.models.mlp import fully_connected, sinusoid_mlp
from fewstep.training.own_network import check_digest, digest_of, own_network, placed


@dataclass(frozen=True)
class Conv4Options:
    """Four convolutional blocks and a linear layer."""

    filters: int = 64
    """Channels of every block."""
    norm: Norm = "batch"
    """Normalisation of every block."""
    downsample: Downsample = "max-pool"
    """Halve by max-pooling, or by stride."""
    activation: Activation = "relu"
    """Activation of every block."""
    conv_bias: bool = False
    """Give the convolutions a bias; batch norm cancels it."""
    initialisation: Initialisation = "xavier"
    """Initial weights: Xavier, with a normal head (MAML's code) or one of zeros, or PyTorch's."""
    spatial_mean: bool | None = None
    """Spatial mean before the linear layer; if not given, only with --downsample stride."""
    projection: bool = False
    """Map the features linearly, at first by the identity or by what a classifier's head knows."""
    unit_features: bool = False
    """Scale each image's features to a mean square of 1 before the linear layer."""
    head: Head = "linear"
    """The last layer: linear, or by the cosine with a direction for each class."""

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return the network for images of (channels, height, width)."""
        channels, height, width = input_shape
        if height != width:
            raise InputError(f"conv4 needs square images, but these are {height}x{width}")
        return Conv4(
            channels,
            outputs,
            height,
            filters=self.filters,
            norm=self.norm,
            downsample=self.downsample,
            activation=self.activation,
            bias=self.conv_bias,
            initialisation=self.initialisation,
            spatial_mean=self.spatial_mean,
            projection=self.projection,
            unit_features=self.unit_features,
            head=self.head,
        )


@dataclass(frozen=True)
class FullyConnectedOptions:
    """Four hidden layers with batch norm, the paper's network without convolutions."""

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return the network for images of (channels, height, width)."""
        channels, height, width = input_shape
        return fully_connected(channels * height * width, outputs)


@dataclass(frozen=True)
class SinusoidMLPOptions:
    """Two hidden layers, the paper's regression network."""

    hidden: int = 40
    """Units of each hidden layer."""

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return the network."""
        return sinusoid_mlp(self.hidden)


@dataclass(frozen=True)
class OwnNetworkOptions:
    """A network of your own."""

    factory: str | None = None
    """The function that makes your network, as FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION; it is
    called with the shape of an input, (channels, height, width) for images, and the number of
    outputs, and returns an nn.Module."""
    factory_digest: str | None = None
    """What the file of a run is known by: noted as it begins, and compared as it goes on."""

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """Return what the function makes."""
        check_digest(self.factory, self.factory_digest)
        return own_network(self.factory, input_shape, outputs)

    def placed(self) -> OwnNetworkOptions:
        """Return the same, with a path that leads to the file from any folder, and its digest."""
        return OwnNetworkOptions(placed(self.factory), digest_of(self.factory))


NETWORKS: dict[str, type] = {
    "conv4": Conv4Options,
    "fully-connected": FullyConnectedOptions,
    "sinusoid-mlp": SinusoidMLPOptions,
    "own": OwnNetworkOptions,
}
