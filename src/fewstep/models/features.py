"""What may lie between a network's blocks and its scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UnitFeatures(nn.Module):
    """Each example's features scaled to a mean square of 1: f / sqrt(mean f^2 + eps).

    A head then tells classes apart by directions, where lengths vary with contrast; the first inner
    step from a head of zeros compares with the support images by cosine.

    Shapes: (examples, features) to the same.

    Reference: Gidaris and Komodakis, Dynamic few-shot visual learning without forgetting,
        CVPR 2018, arXiv:1804.09458, whose cosine classifier (`CosineHead`) fixes the lengths of
        weights too.
    """

    eps = 1e-5

    def forward(self, f: Tensor) -> Tensor:
        """Return the scaled features."""
        return f * torch.rsqrt((f * f).mean(-1, keepdim=True) + self.eps)


class Projection(nn.Module):
    """A square linear map of the features before the head, P f, at first the identity.

    Behind it, the first inner step from a head of zeros compares query with support images by
    <P f, P f'>, a metric that the outer loop learns. `projection_of` takes one from a classifier.

    Args:
        features: Length of f.

    Shapes: (examples, features) to the same.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features))

    def forward(self, f: Tensor) -> Tensor:
        """Return the mapped features."""
        return F.linear(f, self.weight)


def projection_of(head: Tensor) -> Tensor:
    """Return the map of features by which a classifier's head tells its classes apart.

    P = |V|^(1/2) = (V^T V)^(1/4),  V = W - mean over classes of W,

    so that <P f, P f'> = f^T |V| f'. The head's own metric would be f^T V^T V f', the inner product
    of the classes' scores; the square root of it serves classes that the head has not seen better,
    as the identity would less. P is scaled to a mean squared singular value of 1, as the identity
    has.

    Args:
        head: W, (classes, features).

    Returns:
        P, (features, features), symmetric; the identity for a head that tells no classes apart.
    """
    v = (head - head.mean(0)).double()
    if not v.any():
        return torch.eye(head.shape[1], dtype=head.dtype)
    squares, axes = torch.linalg.eigh(v.T @ v)
    roots = squares.clamp(min=0) ** 0.25
    projection: Tensor = (axes * roots) @ axes.T / roots.square().mean().sqrt()
    return projection.to(head.dtype)


class CosineHead(nn.Module):
    """Scores by the angle between features and a direction for each class.

    y_c = s <f, w_c> / (|f| |w_c|), with s and w learned; s starts at 10.

    Args:
        features: Length of f.
        classes: Outputs.

    Shapes: (examples, features) to (examples, classes).

    Reference: Gidaris and Komodakis, Dynamic few-shot visual learning without forgetting,
        CVPR 2018, arXiv:1804.09458, section 3.2.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.scale = nn.Parameter(torch.tensor(10.0))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, f: Tensor) -> Tensor:
        """Return the scores."""
        return self.scale * F.linear(F.normalize(f), F.normalize(self.weight))
