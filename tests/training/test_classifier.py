"""A trained model as an estimator, on drawn characters of a kind that it has never seen."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fewstep.cli.main import main
from fewstep.core.errors import InputError
from fewstep.core.tasks import TaskBatch
from fewstep.data.glyphs import Glyphs
from fewstep.data.views import views_of
from fewstep.training.classifier import FewShotClassifier
from fewstep.training.load import load_learner

RUN = Path(__file__).parents[2] / "results" / "maml++-20w1s-projection" / "run"
WAYS = 20
NAMES = [f"class {c * 7 % WAYS}" for c in range(WAYS)]  # sorted otherwise than drawn


@pytest.fixture(scope="module")
def drawings():
    """Strokes of 255 on 0 of the first and the second image of each class, uint8."""
    store = Glyphs().splits()["test"]
    first = store.starts[:WAYS]
    return store.images[first], store.images[first + 1]


@pytest.fixture(scope="module")
def fitted(drawings):
    return FewShotClassifier(RUN, device="cpu").fit(drawings[0] / 255, NAMES)


def _paper(strokes):
    """Return the drawings as people keep them, dark on light."""
    return [Image.fromarray(255 - np.asarray(each[0])) for each in strokes]


def test_it_names_drawn_characters(fitted, drawings):
    assert fitted.score(drawings[1] / 255, NAMES) > 0.9
    assert fitted.score(drawings[1] / 255, NAMES[1:] + NAMES[:1]) < 0.1
    assert list(fitted.classes_) == sorted(NAMES)
    assert fitted.ways == WAYS
    assert fitted.normalisation == "support set"


@pytest.mark.parametrize("views", [None, "turned"])
@pytest.mark.parametrize("statistics", [None, "batch", "running"])
def test_its_probabilities_are_those_of_the_learner(views, statistics, drawings):
    x_support, x_query = (strokes / 255 for strokes in drawings)
    classifier = FewShotClassifier(
        RUN, num_steps=3, statistics=statistics, views=views, device="cpu"
    )
    found = classifier.fit(x_support, NAMES).predict_proba(x_query)
    y = torch.tensor([sorted(NAMES).index(name) for name in NAMES])
    task = TaskBatch(x_support[None], y[None], x_query[None], y[None])
    learner, use = load_learner(RUN, device="cpu"), statistics or "support"
    outputs = [
        learner.predict(task.seen(view), 1, num_steps=3, statistics=use)[0, -1]
        for view in views_of(views)
    ]
    expected = torch.stack(outputs).mean(0).softmax(-1)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_an_image_is_named_alike_alone_and_among_others(fitted, drawings):
    """By the statistics of its own batch, a single image is normalised by itself."""
    x = drawings[1] / 255
    together = fitted.predict_proba(x)
    one_by_one = np.concatenate([fitted.predict_proba(each[None]) for each in x])
    np.testing.assert_allclose(one_by_one, together, rtol=1e-3, atol=1e-5)
    by_batch = FewShotClassifier(RUN, statistics="batch", device="cpu").fit(
        drawings[0] / 255, NAMES
    )
    assert by_batch.score(x, NAMES) > 0.9
    alone = [by_batch.score(each[None], [name]) for each, name in zip(x, NAMES, strict=True)]
    assert np.mean(alone) < 0.5


@pytest.mark.parametrize("statistics", [None, "batch"])
def test_many_images_go_through_the_module_in_parts(drawings, statistics):
    """Unless they are normalised together."""
    classifier = FewShotClassifier(RUN, statistics=statistics, device="cpu")
    classifier.fit(drawings[0] / 255, NAMES)
    [module], sizes = classifier._modules, []
    module.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    x = drawings[1].repeat(15, 1, 1, 1) / 255
    found = classifier.predict_proba(x)
    assert sizes == ([300] if statistics == "batch" else [256, 44])
    np.testing.assert_allclose(found, np.tile(found[:WAYS], (15, 1)), rtol=1e-3, atol=1e-5)


def test_images_may_be_files_or_pil_or_tensors(fitted, drawings, tmp_path):
    expected = fitted.predict_proba(drawings[1] / 255)
    images = _paper(drawings[1])
    files = [tmp_path / f"{number}.png" for number in range(WAYS)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    for given in (images, files, [str(file) for file in files]):
        np.testing.assert_array_equal(fitted.predict_proba(given), expected)


def test_characters_that_are_light_on_dark_are_told(drawings, tmp_path):
    """In silence most would be misnamed."""
    classifier = FewShotClassifier(RUN, device="cpu")
    dark = [tmp_path / f"{number}.png" for number in range(WAYS)]
    for number, (image, file) in enumerate(zip(_paper(drawings[0]), dark, strict=True)):
        (ImageOps.invert(image) if number in (3, 5) else image).save(file)
    with pytest.warns(UserWarning, match=r"more ink than paper, 2 in all, such as .*3.png; .* inv"):
        classifier.fit(dark, NAMES)
    with pytest.warns(UserWarning, match=rf"{WAYS} in all, such as number 0; .*tensor 1 on 0"):
        classifier.predict(1 - drawings[1] / 255)
    classifier.predict(_paper(drawings[1]))  # of these it does not warn


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pil_images_are_read_in_any_mode(fitted, drawings, mode):
    images = _paper(255 * (drawings[1] > 127).byte())  # black and white, which all modes have
    given = [image.convert(mode) for image in images]
    if mode == "I;16":
        given = [Image.fromarray(np.asarray(image).astype(np.uint16) * 257) for image in images]
    assert {image.mode for image in given} == {mode}
    np.testing.assert_array_equal(fitted.predict_proba(given), fitted.predict_proba(images))


def test_pil_images_are_upright_as_their_files_are(fitted, drawings, tmp_path):
    """As photographs come from a phone: turned, with an orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    files = [tmp_path / f"{number}.png" for number in range(WAYS)]
    for image, file in zip(_paper(drawings[1]), files, strict=True):
        image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    expected = fitted.predict_proba(_paper(drawings[1]))
    np.testing.assert_array_equal(fitted.predict_proba(files), expected)
    opened = [Image.open(file) for file in files]
    np.testing.assert_array_equal(fitted.predict_proba(opened), expected)


def test_another_fit_takes_the_place_of_the_first(drawings):
    classifier = FewShotClassifier(RUN, device="cpu")
    first = classifier.fit(drawings[0] / 255, range(WAYS)).predict(drawings[1] / 255)
    again = classifier.fit(drawings[0].flip(0) / 255, range(WAYS)).predict(drawings[1] / 255)
    assert first.dtype.kind == "i"
    assert (first + again == WAYS - 1).mean() > 0.8


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (range(WAYS, 0, -1), [*range(1, WAYS + 1)]),
        (np.arange(WAYS)[::-1] / 2, [c / 2 for c in range(WAYS)]),
        (torch.arange(WAYS).flip(0), [*range(WAYS)]),
        ([("owl", WAYS - c) for c in range(WAYS)], [("owl", c + 1) for c in range(WAYS)]),
        ([1, "1", None, *range(2, WAYS - 1)], [1, "1", None, *range(2, WAYS - 1)]),
        ([("owl",), "owl", *range(2, WAYS)], [("owl",), "owl", *range(2, WAYS)]),
    ],
    ids=["integers", "array", "tensor", "tuples", "mixed", "a tuple among others"],
)
def test_a_class_may_be_called_whatever(drawings, labels, classes):
    """Sorted, or, where some cannot be compared, as they come."""
    x = drawings[0] / 255
    classifier = FewShotClassifier(RUN, device="cpu").fit(x, labels)
    assert list(classifier.classes_) == classes
    assert classifier.score(x, labels) == 1
    found = classifier.predict(x)
    assert [classes.index(label) for label in found] == [classes.index(label) for label in labels]
    assert classifier.score(x, [*labels[1:], *labels[:1]]) == 0
    assert classifier.score(x, [("no", "class")] * WAYS) == 0


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("classes", [2, 5, 8])
def test_it_tells_fewer_classes_than_it_learned(classes, shots):
    """As surely as all: by the mean over fewer its steps would be too long."""
    store = Glyphs().splits()["test"]
    names = list(range(classes))
    classifier = FewShotClassifier(RUN, device="cpu")
    for first in range(0, 80, 20):
        starts = store.starts[first : first + classes]
        support = torch.cat([store.images[starts + i] for i in range(shots)]) / 255
        x_query = torch.cat([store.images[starts + i] for i in (5, 6)]) / 255
        found = classifier.fit(support, names * shots).predict_proba(x_query)
        assert found.shape == (2 * classes, classes)
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
        assert classifier.score(x_query, names * 2) > 0.9
    assert classifier.ways == WAYS


@pytest.mark.parametrize("classes", [2, 7])
def test_a_step_moves_each_of_fewer_classes_as_far(drawings, classes):
    """A gradient step by a part of the loss is one by that part of the rates."""
    x_support, x_query = (strokes[:classes] / 255 for strokes in drawings)
    y = torch.arange(classes)
    learner = load_learner(RUN, device="cpu")
    state = learner.state_tensors()
    rates = {n: t * classes / WAYS for n, t in state.items() if n.startswith("model.inner_lr.")}
    learner.load_state_tensors(state | rates)
    module = learner.adapt(x_support, y, statistics="support")
    expected = module(x_query)[:, :classes].softmax(-1).detach()
    found = FewShotClassifier(RUN, device="cpu").fit(x_support, y).predict_proba(x_query)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)


def test_it_stays_what_it_was_when_it_was_made(drawings, tmp_path):
    run = tmp_path / "run"
    words = "train --recipe prototypes --filters 4 --iterations 2 --val-tasks 2 --test-tasks 2"
    assert main([*words.split(), "--out", str(run), "--device", "cpu"]) == 0
    classifier = FewShotClassifier(run, device="cpu")
    shutil.rmtree(run)
    images = drawings[0][:3].repeat(2, 1, 1, 1) / 255
    assert classifier.fit(images, list("abcabc")).classes_.tolist() == ["a", "b", "c"]


def test_what_it_refuses(fitted, drawings, tmp_path):
    x = drawings[0] / 255
    new = FewShotClassifier(RUN, device="cpu")
    (tmp_path / "text.png").write_text("no image")
    for told, call in {
        "call fit": lambda: new.predict(x),
        "21 classes are too many for the run, which learned to tell 20 apart": lambda: new.fit(
            torch.cat([x, x[:1]]), range(21)
        ),
        "1 class leaves nothing to tell apart; give 2": lambda: new.fit(x, ["one"] * WAYS),
        "20 images have 19 labels": lambda: new.fit(x, range(19)),
        "4 images have 1 labels; give one for each": lambda: fitted.score(x[:4], NAMES[:1]),
        "4 images have 3 labels": lambda: fitted.score(x[:4], NAMES[:3]),
        "a label of type ndarray cannot name a class; give": lambda: new.fit(x, np.eye(WAYS)),
        "a label of type Tensor cannot": lambda: new.fit(x, torch.eye(WAYS)),
        "a label of type list cannot": lambda: fitted.score(x[:2], [["owl"], ["elk"]]),
        r"images of shape \(1, 27, 28\) do not fit": lambda: fitted.predict(x[:, :, 1:]),
        "'c0.png' is a single image|c0.png is a single image; give a list": lambda: fitted.predict(
            "c0.png"
        ),
        "is a single image": lambda: fitted.fit(Path("c0.png"), NAMES),
        "there is no image": lambda: fitted.predict([]),
        "there is no image; give": lambda: fitted.score(x[:0], []),
        r"pixels from 0 to 255 are not all on \[0, 1\]; .* by 255": lambda: new.fit(
            drawings[0], NAMES
        ),
        r"pixels from 0\.0 to 255\.0 are not": lambda: fitted.predict(255 * x),
        r"pixels from 0\.0 to inf are not": lambda: fitted.predict(x / (1 - x)),
        r"pixels from nan to nan are not": lambda: fitted.predict(np.nan * x),
        r"text.png is not a readable image": lambda: fitted.predict([tmp_path / "text.png"]),
        "the image is not .* pixels of 32 bits .*; save 8 or 16": lambda: fitted.predict(
            [image.convert("I") for image in _paper(drawings[1])]
        ),
        "pixels of 32 bits": lambda: fitted.predict([Image.new("F", (28, 28))]),
        r"mode HSV, cannot be read \(.*\); give image\.convert\('RGB'\)": lambda: fitted.predict(
            [Image.new("HSV", (28, 28))]
        ),
        "an image of type ndarray is neither a file nor a PIL image; give": lambda: fitted.predict(
            list(x.numpy())
        ),
        "an image of type Tensor is": lambda: new.fit(list(x), NAMES),
        "unknown views 'sideways'": lambda: FewShotClassifier(RUN, views="sideways"),
        "unknown statistics 'bach'": lambda: FewShotClassifier(RUN, statistics="bach"),
        "holds no run": lambda: FewShotClassifier(tmp_path),
        "num_steps=99 is more": lambda: FewShotClassifier(RUN, num_steps=99, device="cpu").fit(
            x, range(WAYS)
        ),
    }.items():
        with pytest.raises(InputError, match=told):
            call()


def test_it_rounds_as_its_run_does(drawings):
    """Beside the learner, PyTorch would take TF32 for convolutions on a GPU."""
    classifier = FewShotClassifier(RUN, device="cpu").fit(drawings[0] / 255, NAMES)
    seen = []
    classifier._modules[0].register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    classifier.predict(drawings[1] / 255)
    assert seen == ["ieee"]
