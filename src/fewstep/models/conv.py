"""Conv4, the four-block convolutional network of the few-shot papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.core.errors import InputError, check_name
from fewstep.core.normalise import NormaliseBy
from fewstep.models import fast_block
from fewstep.models.features import CosineHead, Projection, UnitFeatures
from fewstep.models.form import Form
from fewstep.models.of_tasks import one_vmap_at_most

Norm = Literal["batch", "layer", "none"]
Downsample = Literal["max-pool", "stride"]
Activation = Literal["relu", "leaky-relu"]
Initialisation = Literal["xavier", "finn", "zero-head", "torch"]
Head = Literal["linear", "cosine"]

PROJECTION = "blocks.projection.weight"
"""Name of the parameter of a `Conv4`'s projection."""


class ConvBlock(nn.Module):
    """3x3 convolution, normalisation, activation, halving of the resolution.

    Under batch norm in training mode, without a bias, `fast_block` computes the same in one piece;
    everything else calls the parts in turn, such as parts with hooks, and parts exchanged or
    changed.

    Args:
        in_channels: Channels of the input.
        filters: Channels of the output.
        size: Height and width of the input, for layer norm, which has a parameter per element.
        norm: "batch", "layer" (over channels, height and width) or "none".
        downsample: "max-pool" 2x2 after a stride of 1, or a "stride" of 2 without pooling.
        activation: "relu", or "leaky-relu" with slope 0.01.
        bias: Give the convolution a bias. Batch norm by batch statistics cancels it.

    Raises:
        InputError: `norm`, `downsample` or `activation` is none of these.

    Shapes: (examples, in_channels, size, size) to (examples, filters, size', size'), size' being
        size // 2 after a pool and (size + 1) // 2 after a stride.

    Deviation: the scale of layer norm is learned, where MAML++'s code, whose layer norm is over the
        same elements, leaves it at 1.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        size: int,
        *,
        norm: Norm,
        downsample: Downsample,
        activation: Activation,
        bias: bool,
    ) -> None:
        check_name("norm", norm, get_args(Norm))
        check_name("downsample", downsample, get_args(Downsample))
        check_name("activation", activation, get_args(Activation))
        super().__init__()
        stride = 1 if downsample == "max-pool" else 2
        conv_size = (size - 1) // stride + 1
        self.conv = nn.Conv2d(in_channels, filters, 3, stride=stride, padding=1, bias=bias)
        norms: dict[Norm, Callable[[], nn.Module]] = {
            "batch": lambda: nn.BatchNorm2d(filters),
            "layer": lambda: nn.LayerNorm((filters, conv_size, conv_size)),
            "none": nn.Identity,
        }
        self.norm = norms[norm]()
        self.pool = nn.MaxPool2d(2) if downsample == "max-pool" else nn.Identity()
        self.activation = nn.ReLU() if activation == "relu" else nn.LeakyReLU(0.01)
        self.out_size = conv_size // 2 if downsample == "max-pool" else conv_size
        self._as_built = (self.conv, self.norm, self.pool, self.activation)
        self._windows = _settings(self.conv), _settings(self.pool)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        parts = (self.conv, self.norm, self.pool, self.activation)
        slope = getattr(self.activation, "negative_slope", 0.0)
        if slope < 0 or any(
            a is not b or _is_watched(a) for a, b in zip(parts, self._as_built, strict=True)
        ):
            y: Tensor = self.pool(self.activation(self.norm(self.conv(x))))
            return y
        if (
            isinstance(self.norm, nn.BatchNorm2d)
            and self.norm.training
            and self.norm.track_running_stats
            and self.norm.num_batches_tracked is not None
            and self.conv.bias is None
            and self._windows == (_settings(self.conv), _settings(self.pool))
            and x.ndim == 4
            and x.shape[1] == self.conv.weight.shape[1]  # else PyTorch says what is wrong
            and not torch.compiler.is_compiling()  # what is exported needs PyTorch alone
            and one_vmap_at_most()
        ):
            return self._in_one_piece(x, self.norm, slope)
        # Our activations rise monotonically, so they may follow the pool, with less left to do.
        z: Tensor = self.activation(self.pool(self.norm(self.conv(x))))
        return z

    def _in_one_piece(self, x: Tensor, norm: nn.BatchNorm2d, slope: float) -> Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        by = NormaliseBy.innermost()
        form = Form(
            stride=self.conv.stride[0],
            pool=isinstance(self.pool, nn.MaxPool2d),
            slope=slope,
            eps=norm.eps,
            examples=by.first(len(x)),
            needs_moments=by.needs_moments,
        )
        given = by.given(norm.running_mean, norm.running_var)
        out = fast_block.block(x, self.conv.weight, norm.weight, norm.bias, form, given)
        norm.num_batches_tracked.add_(1)
        if by.update is not None:
            height, width = ((size - 1) // form.stride + 1 for size in x.shape[-2:])
            # Without a momentum, the mean over all batches.
            momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            count = (form.examples or len(x)) * height * width
            by.update(norm.running_mean, norm.running_var, out.moments, count, momentum)
        return out.z


def _settings(part: nn.Module) -> dict[str, object]:
    """Return what a part was built with and may be changed in place."""
    return {n: v for n, v in vars(part).items() if n[0] != "_" and n != "training"}


def _is_watched(part: nn.Module) -> bool:
    """Whether someone wants to know what goes in and out."""
    hooks = (
        part._forward_hooks, part._forward_pre_hooks, part._backward_hooks,
        part._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks)


class Conv4(nn.Sequential):
    """Four convolutional blocks and a linear layer, or a `CosineHead`.

    Args:
        in_channels: Channels of the images.
        ways: Classes of a task, the outputs.
        size: Height and width of the images.
        filters: Channels of every block.
        norm: As in `ConvBlock`.
        downsample: As in `ConvBlock`.
        activation: As in `ConvBlock`.
        bias: Give the convolutions a bias; off by default under batch norm, which cancels it.
        initialisation: "xavier" (uniform, zero biases, as in MAML++'s code); "finn", the same with
            a standard normal head, as MAML's code for Omniglot; "zero-head", the same with a head
            of zeros, which prefers no class; "torch", PyTorch's defaults.
        spatial_mean: Give the head the spatial mean of the last map, whatever the size of the
            images, instead of all of it. None: under "stride", as MAML's code for Omniglot; not
            under "max-pool", as for mini-ImageNet.
        projection: Map the features by a `Projection` before they are scaled and given to the head;
            this and the next two are in none of the papers on gradient-based meta-learning.
        unit_features: Scale the features of each image to a mean square of 1 before the head.
        head: "linear", or "cosine" (`CosineHead`), for a classifier whose features others take.

    Raises:
        InputError: images too small for four halvings, `filters` or `ways` below 1, a name that
            is none of these, or a cosine head of zeros, which have no direction.

    Shapes: (examples, in_channels, size, size) to (examples, ways).

    Deviation: MAML's TensorFlow batch norm has no scale and eps 1e-3; this has a scale and 1e-5.

    Reference: Vinyals et al., Matching networks, NeurIPS 2016, arXiv:1606.04080.
    """

    def __init__(
        self,
        in_channels: int,
        ways: int,
        size: int,
        *,
        filters: int = 64,
        norm: Norm = "batch",
        downsample: Downsample = "max-pool",
        activation: Activation = "relu",
        bias: bool | None = None,
        initialisation: Initialisation = "xavier",
        spatial_mean: bool | None = None,
        projection: bool = False,
        unit_features: bool = False,
        head: Head = "linear",
    ) -> None:
        for name, value in (("filters", filters), ("ways", ways), ("in_channels", in_channels)):
            if value < 1:
                raise InputError(f"Conv4({name}={value}) must be at least 1")
        _check_head(head, initialisation)
        blocks: list[nn.Module] = []
        channels, resolution = in_channels, size
        for _ in range(4):
            block = ConvBlock(
                channels,
                filters,
                resolution,
                norm=norm,
                downsample=downsample,
                activation=activation,
                bias=norm != "batch" if bias is None else bias,
            )
            blocks.append(block)
            channels, resolution = filters, block.out_size
            if resolution < 1:
                raise InputError(f"Conv4(size={size}) cannot be halved 4 times; use 16 or more")
        if downsample == "stride" if spatial_mean is None else spatial_mean:
            blocks.append(nn.AdaptiveAvgPool2d(1))
            resolution = 1
        blocks.append(nn.Flatten())
        features = filters * resolution**2
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if projection:
            self.blocks.add_module("projection", Projection(features))
        if unit_features:
            self.unit_features = UnitFeatures()
        of_kind = {"linear": nn.Linear, "cosine": CosineHead}[head]
        self.head = of_kind(features, ways)
        _initialise(self, initialisation)


def _check_head(head: Head, initialisation: Initialisation) -> None:
    check_name("initialisation", initialisation, get_args(Initialisation))
    check_name("head", head, get_args(Head))
    if (head, initialisation) == ("cosine", "zero-head"):
        raise InputError(
            "Conv4(head='cosine', initialisation='zero-head') has directions of length 0; use "
            "another initialisation, or head='linear'"
        )


def _initialise(model: Conv4, initialisation: Initialisation) -> None:
    if initialisation != "torch":
        model.apply(_xavier)
    if initialisation == "finn":
        nn.init.normal_(model.head.weight)
    elif initialisation == "zero-head":
        nn.init.zeros_(model.head.weight)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
