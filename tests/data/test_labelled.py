import pytest
import torch

from fewstep import InputError
from fewstep.data.augmentation import Augmentation
from fewstep.data.labelled import LabelledImages, hold_out
from fewstep.data.store import ClassStore

COUNTS = [4, 9, 6, 12]
CLASS_OF_IMAGE = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
SIDE = 5
CHANGES = Augmentation(flips=True, shifts=2)


def store_of(counts=COUNTS) -> ClassStore:
    """Image i has the grey i in channel 0, its row in channel 1 and its column in channel 2."""
    images = torch.zeros(sum(counts), 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, 0] = torch.arange(sum(counts))[:, None, None]
    images[:, 1] = torch.arange(SIDE)[:, None]
    images[:, 2] = torch.arange(SIDE)
    return ClassStore.from_counts(images, counts, [f"class-{c}" for c in range(len(counts))])


def test_every_image_has_the_label_of_its_class_and_classes_come_alike():
    batch = LabelledImages(store_of(), "train", examples=500).batch(0, 4)
    image = (255 * batch.x_query[:, :, 0, 0, 0]).round().long()
    assert torch.equal(batch.y_query, CLASS_OF_IMAGE[image])
    for c, count in enumerate(COUNTS):
        assert (batch.y_query == c).double().mean() == pytest.approx(1 / 4, abs=0.04)
        assert len(image[batch.y_query == c].unique()) == count


def test_the_support_set_is_the_first_image():
    batch = LabelledImages(store_of(), "train", examples=7, augmentation=CHANGES).batch(3, 2)
    assert torch.equal(batch.x_support, batch.x_query[:, :1])
    assert torch.equal(batch.y_support, batch.y_query[:, :1])


def test_a_task_depends_on_its_number_seed_and_split_only():
    def x(start, split="train", seed=0):
        source = LabelledImages(store_of(), split, examples=40, augmentation=CHANGES, seed=seed)
        return source.batch(start, 3).x_query

    assert torch.equal(x(0)[2], x(2)[0])
    for other in (x(2), x(0, seed=1), x(0, split="val")):
        assert not torch.equal(x(0)[0], other[0])


def test_each_image_is_changed_for_itself_and_keeps_its_label():
    options = {"examples": 200, "rotations": "classes"}
    plain, own = (
        LabelledImages(store_of(), "train", augmentation=augmentation, **options).batch(0, 2)
        for augmentation in (Augmentation(), CHANGES)
    )
    assert torch.equal(own.y_query, plain.y_query)
    assert torch.equal(own.x_query[:, :, 0], plain.x_query[:, :, 0])  # the same images
    of_one_class = own.x_query[own.y_query == 0][:, 1:]
    assert len(of_one_class.unique(dim=0)) > 10


@pytest.mark.parametrize(("rotations", "ways"), [("classes", 4), ("mirrored-classes", 8)])
def test_turned_images_are_classes_of_their_own(rotations, ways):
    images = LabelledImages(store_of(), "train", examples=1000, rotations=rotations)
    assert images.classes == 4 * ways
    batch = images.batch(0, 1)
    image = (255 * batch.x_query[:, :, 0, 0, 0]).round().long()
    assert torch.equal(batch.y_query % 4, CLASS_OF_IMAGE[image])
    row, column = (255 * batch.x_query[0, :, 1:]).round().long().unbind(1)
    at = torch.arange(SIDE)[:, None] * SIDE + torch.arange(SIDE)
    for example, label in zip(row * SIDE + column, batch.y_query[0], strict=True):
        expected = at.rot90(int(label) // 4 % 4)
        assert torch.equal(example, expected.flip(1) if label >= 16 else expected)
    assert set(batch.y_query.unique().tolist()) == set(range(4 * ways))


def test_held_out_images_are_nobody_else_s():
    store = store_of()
    parts = hold_out(store, 0.2)
    assert {s: p.counts.tolist() for s, p in parts.items()} == {
        "train": [2, 5, 4, 8], "val": [1, 2, 1, 2], "test": [1, 2, 1, 2],
    }  # fmt: skip
    seen = [
        set(range(int(start), int(start + count)))
        for part in parts.values()
        for start, count in zip(part.starts, part.counts, strict=True)
    ]
    assert sum(map(len, seen)) == len(set.union(*seen)) == sum(COUNTS)
    for part in parts.values():
        batch = LabelledImages(part, "train", examples=200).batch(0, 1)
        image = (255 * batch.x_query[:, :, 0, 0, 0]).round().long()
        assert torch.equal(batch.y_query, CLASS_OF_IMAGE[image])


@pytest.mark.parametrize("share", [0.0, -0.1, 0.4, 1.0])
def test_shares_that_leave_nothing_are_refused(share):
    with pytest.raises(InputError, match=rf"^held_out={share} .* the smallest has 4$"):
        hold_out(store_of(), share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "examples=0 must be at least 1"),
        ({"examples": 1, "rotations": "episode"}, "unknown rotations 'episode'"),
        ({"examples": 1, "augmentation": Augmentation(shifts=5)}, "shifts=5 must be 0 to 4 pixels"),
    ],
    ids=str,
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        LabelledImages(store_of(), "train", **options)
