"""A trained model as an estimator: fit it to a few images of your classes, then let it predict."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.core.norm import Use
from fewstep.core.precision import fp32_products
from fewstep.data.archives import contents
from fewstep.data.glyphs import Glyphs
from fewstep.data.omniglot import Omniglot
from fewstep.data.views import Views, views_of
from fewstep.training.config import SinusoidData
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.load import OneCheckpoint, Saved

Picture = Path | str | Image.Image

_AT_ONCE = 256  # images that go through the module
_OF_PNG = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})  # modes of PIL


class FewShotClassifier:
    """A run's model that learns your classes from a few images of each, and names that of others.

    It has `fit`, `predict`, `predict_proba`, `score` and `classes_`, as scikit-learn's classifiers;
    `ways`, how many classes the run learned to tell apart, and `normalisation`, what batch
    normalisation does. It takes fewer classes, too, and more where tasks start from prototypes.
    Where the last layer is learned, the support loss of fewer classes is multiplied by their share,

        L = (classes / ways) mean over the support set of cross entropy,

    so that a step moves each as far as in training: by the mean alone it would be too far.

    Args:
        path: Folder of the run; the data that it was trained on are not needed.
        checkpoint: The best in validation, or the last.
        num_steps: Inner steps; None takes the run's eval_steps.
        extra_steps: Refuse more steps than trained, or repeat the last, where parts differ by step;
            None takes the run's.
        statistics: What batch normalisation normalises by; None takes the run's, or "support" in
            place of "batch", by which the images of a call are normalised together: each answer
            would depend on the others, and that for a single image mean little.
        views: Take the mean of the outputs over your images as they are and "mirrored", or "turned"
            by 1 to 3 quarters, each adapted to on its own.
        device: "cpu", "cuda", ...; "auto" takes a GPU where there is one.

    Raises:
        InputError: there is no such run, checkpoint or device, or it has learned no few-shot
            classification of images.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        checkpoint: OneCheckpoint = "best",
        num_steps: int | None = None,
        extra_steps: ExtraSteps | None = None,
        statistics: Use | None = None,
        views: Views | None = None,
        device: str = "auto",
    ) -> None:
        self._saved = Saved.read(path, checkpoint, device, extra_steps)
        config = self._saved.config
        if isinstance(config.data, SinusoidData):
            raise InputError(f"{path} is a run on sinusoids, and a classifier needs images")
        self._learner = learner = self._saved.learner()
        self._takes_any = config.takes_any_ways
        assert isinstance(config.episodes, ClassificationOptions)
        self._data = config.data
        self._views = views_of(views)
        self._modules: list[nn.Module] = []
        self._number_of: dict[Any, int] = {}
        self.ways = config.episodes.ways
        self.num_steps = config.algorithm.eval_steps if num_steps is None else num_steps
        self.classes_: NDArray[Any] = np.array([])
        norm = learner.algorithm.norm_statistics
        own: Use = "support" if norm.use == "batch" else norm.use
        norm = replace(norm, use=own if statistics is None else statistics)
        self._statistics = norm.use
        self.normalisation = norm.describe(learner.module)

    def fit(self, images: Sequence[Picture] | Tensor, labels: Iterable[Any]) -> Self:
        """Adapt to your classes.

        Args:
            images: Image files or PIL images, brought to the run's size, with dark ink on light
                paper where it is of characters (others are warned of); or a tensor as the run's
                own, on [0, 1], (images, channels, height, width).
            labels: The class of each, whatever it is called, by a string, a number or a tuple.
                `classes_` has them sorted or, where some cannot be compared, as they come.

        Raises:
            InputError: the classes are more than the run's ways, or one alone, the labels not as
                many as the images, there is no image, one cannot be read or has pixels beyond
                [0, 1], or the steps are more than the run has learned.
        """
        x = self._read(images)
        of_images = _labels(labels, len(x))
        classes = _in_order(of_images)
        self.check_classes(len(classes))
        learner = self._learner_of(len(classes))
        number_of = {name: c for c, name in enumerate(classes)}
        y = torch.tensor([number_of[label] for label in of_images], device=x.device)
        self._modules = [
            learner.adapt(view(x), y, num_steps=self.num_steps, statistics=self._statistics)
            for view in self._views
        ]
        self.classes_, self._number_of = _as_array(classes), number_of
        return self

    def _learner_of(self, classes: int) -> MetaLearner:
        """Return the learner for so many classes."""
        if classes == self.ways:
            return self._learner
        if self._takes_any:
            return self._saved.learner(classes)
        share = classes / self.ways

        def as_much_of_a_class(outputs: Tensor, y: Tensor) -> Tensor:
            return share * F.cross_entropy(outputs, y)

        return self._saved.learner(support_loss=as_much_of_a_class)

    def check_classes(self, number: int) -> None:
        """Check that it can tell so many classes apart.

        Raises:
            InputError: it cannot.
        """
        if number < 2:
            raise InputError(f"{number} class leaves nothing to tell apart; give 2 or more")
        if number > self.ways and not self._takes_any:
            raise InputError(
                f"{number} classes are too many for the run, which learned to tell {self.ways} "
                f"apart; give {self.ways} or fewer, or train one with --start prototypes"
            )

    def predict_proba(self, images: Sequence[Picture] | Tensor) -> NDArray[np.float32]:
        """Return the probability of each class, (images, classes), in the order of `classes_`.

        Raises:
            InputError: `fit` was not called, or the images are refused as in `fit`.
        """
        if not self._modules:
            raise InputError("the classifier has no classes yet; call fit(images, labels) first")
        x = self._read(images)
        # By the batch, images are normalised together; else memory need not grow with them.
        at_once = len(x) if self._statistics == "batch" else _AT_ONCE
        with torch.no_grad(), fp32_products(self._saved.config.precision):
            scores = torch.cat([self._outputs(part) for part in x.split(at_once)])
        shares = scores[:, : len(self.classes_)].softmax(-1)
        found: NDArray[np.float32] = shares.cpu().numpy()
        return found

    def _outputs(self, x: Tensor) -> Tensor:
        """Return the mean of the outputs over the views."""
        outputs = [module(view(x)) for module, view in zip(self._modules, self._views, strict=True)]
        return torch.stack(outputs).mean(0)

    def predict(self, images: Sequence[Picture] | Tensor) -> NDArray[Any]:
        """Return the label of each image; errors as in `predict_proba`."""
        found: NDArray[Any] = self.classes_[self.predict_proba(images).argmax(1)]
        return found

    def score(self, images: Sequence[Picture] | Tensor, labels: Iterable[Any]) -> float:
        """Return the share of images whose label is right; errors as in `fit`."""
        found = self.predict_proba(images).argmax(1)
        right = [self._number_of.get(label) for label in _labels(labels, len(found))]
        return float(np.mean([a == b for a, b in zip(found, right, strict=True)]))

    def _read(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Return images as the run's are, (images, channels, height, width) on [0, 1]."""
        device = next(self._learner.module.parameters()).device
        if isinstance(images, (str, Path, Image.Image)):
            raise InputError(f"{images} is a single image; give a list, [{images!r}]")
        if len(images) == 0:
            raise InputError("there is no image; give one or more")
        if isinstance(images, Tensor):
            if images.shape[1:] != self._data.image_shape:
                raise InputError(
                    f"images of shape {tuple(images.shape[1:])} do not fit the run, whose images "
                    f"are {self._data.image_shape}; give those, or image files"
                )
            if not ((images >= 0) & (images <= 1)).all():
                raise InputError(
                    f"pixels from {images.min().item()} to {images.max().item()} are not all on "
                    "[0, 1]; divide those of 8 bits by 255, or take .clamp(0, 1)"
                )
            names = [f"number {i}" for i in range(len(images))]
            x = images.to(device, torch.float32)
        else:
            files = [_content(each) for each in images]
            names = [name for _, name in files]
            pixels = np.stack([self._data.pixels(*file) for file in files])
            x = torch.from_numpy(pixels).to(device, torch.float32).div_(255)
        if isinstance(self._data, Glyphs | Omniglot):
            _warn_of_light_ink(x, names)
        return x


def _warn_of_light_ink(x: Tensor, names: Sequence[str]) -> None:
    """Warn of characters that have more ink than paper, as those drawn light on dark have."""
    found = (x.mean((1, 2, 3)) > 0.5).nonzero()[:, 0].tolist()
    if found:
        warnings.warn(
            f"images with more ink than paper, {len(found)} in all, such as {names[found[0]]}; "
            "characters are dark ink on light paper (in a tensor 1 on 0), so invert what is light "
            "on dark",
            stacklevel=2,
        )


def _labels(labels: Iterable[Any], images: int) -> list[Any]:
    """Return the label of each image."""
    # A number may come as a tensor, of which no two are the same key.
    found = [
        label.item() if isinstance(label, Tensor | np.ndarray) and label.ndim == 0 else label
        for label in labels
    ]
    if len(found) != images:
        raise InputError(f"{images} images have {len(found)} labels; give one for each")
    for label in found:
        if isinstance(label, Tensor) or not _is_key(label):
            raise InputError(
                f"a label of type {type(label).__name__} cannot name a class; give a string, a "
                "number or a tuple of them"
            )
    return found


def _is_key(label: object) -> bool:
    try:
        hash(label)
    except TypeError:
        return False
    return True


def _in_order(labels: list[Any]) -> list[Any]:
    """Return the classes, sorted or, where some cannot be compared, as they come."""
    classes = list(dict.fromkeys(labels))
    try:
        return sorted(classes)
    except TypeError:
        return classes


def _as_array(classes: list[Any]) -> NDArray[Any]:
    """Return the classes as an array, of objects where numpy would make others of them."""
    kind = type(classes[0])
    is_of_numpy = issubclass(kind, str | int | float | np.generic)
    if is_of_numpy and all(type(each) is kind for each in classes):
        return np.array(classes)
    return np.fromiter(classes, object, len(classes))


def _content(image: Picture) -> tuple[bytes, str]:
    """Return an image as a file's content, and what to call it."""
    if isinstance(image, Image.Image):
        return _written(image), "the image"
    if not isinstance(image, str | PathLike):
        raise InputError(
            f"an image of type {type(image).__name__} is neither a file nor a PIL image; give "
            "those, or all in one tensor, as torch.stack makes it"
        )
    return contents(Path(image)), str(image)


def _written(image: Image.Image) -> bytes:
    """Return an image as a file's content, upright, as PNG would leave its orientation out."""
    file = io.BytesIO()
    try:
        # TIFF takes what PNG cannot: other colours, and 32 bits, which the reader refuses.
        kind = "png" if image.mode in _OF_PNG else "tiff"
        ImageOps.exif_transpose(image).save(file, kind)
    except OSError as error:
        raise InputError(
            f"the image, a PIL image of mode {image.mode}, cannot be read ({error}); give "
            "image.convert('RGB')"
        ) from error
    return file.getvalue()
