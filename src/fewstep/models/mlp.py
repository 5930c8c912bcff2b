"""The fully connected networks of the MAML paper."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from fewstep.core.errors import InputError


def sinusoid_mlp(hidden: int = 40) -> nn.Sequential:
    """Return the regression network 1-40-40-1 with ReLU.

    Args:
        hidden: Units of each of the two hidden layers.

    Raises:
        InputError: `hidden` is below 1.

    Shapes: (examples, 1) to (examples, 1).

    Deviation: PyTorch's initialisation in place of a truncated normal of deviation 0.01.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.1.
    """
    if hidden < 1:
        raise InputError(f"sinusoid_mlp(hidden={hidden}) must be at least 1")
    return nn.Sequential(
        nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )


def fully_connected(in_features: int, ways: int) -> nn.Sequential:
    """Return the network without convolutions: 256-128-64-64, each with batch norm and ReLU.

    Args:
        in_features: Pixels of an image, channels counted.
        ways: Classes of a task, the outputs.

    Raises:
        InputError: an argument is below 1.

    Shapes: (examples, ...) to (examples, ways).

    Deviation: weights are normal with deviation 0.01, not truncated at two deviations.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.2.
    """
    for name, value in (("in_features", in_features), ("ways", ways)):
        if value < 1:
            raise InputError(f"fully_connected({name}={value}) must be at least 1")
    layers: list[nn.Module] = [nn.Flatten()]
    widths = (in_features, 256, 128, 64, 64)
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.BatchNorm1d(next_width), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], ways))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
