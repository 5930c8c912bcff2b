import pytest
import torch

from fewstep import InputError
from fewstep.data.labelled import LabelledImages, hold_out
from fewstep.data.store import ClassStore

COUNTS = [4, 9, 6, 12]
CLASS_OF_IMAGE = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
SIDE = 5


def store_of(counts=COUNTS) -> ClassStore:
    """Image i has the grey i in channel 0, its row in channel 1 and its column in channel 2."""
    images = torch.zeros(sum(counts), 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, 0] = torch.arange(sum(counts))[:, None, None]
    images[:, 1] = torch.arange(SIDE)[:, None]
    images[:, 2] = torch.arange(SIDE)
    return ClassStore.from_counts(images, counts, [f"class-{c}" for c in range(len(counts))])


def channels(source: LabelledImages, tasks: int = 1) -> torch.Tensor:
    """Return grey, row and column of every pixel, (3, tasks, examples, height, width)."""
    return (255 * source.batch(0, tasks).x_query).round().long().movedim(2, 0)


def test_every_image_has_the_label_of_its_class_and_classes_come_alike():
    batch = LabelledImages(store_of(), "train", examples=500).batch(0, 4)
    image = (255 * batch.x_query[:, :, 0, 0, 0]).round().long()
    assert torch.equal(batch.y_query, CLASS_OF_IMAGE[image])
    for c, count in enumerate(COUNTS):
        assert (batch.y_query == c).double().mean() == pytest.approx(1 / 4, abs=0.04)
        assert len(image[batch.y_query == c].unique()) == count


def test_the_support_set_is_the_first_image():
    batch = LabelledImages(store_of(), "train", examples=7, flips=True, shifts=2).batch(3, 2)
    assert torch.equal(batch.x_support, batch.x_query[:, :1])
    assert torch.equal(batch.y_support, batch.y_query[:, :1])


def test_a_task_depends_on_its_number_seed_and_split_only():
    def x(start, split="train", seed=0):
        source = LabelledImages(store_of(), split, examples=40, flips=True, shifts=1, seed=seed)
        return source.batch(start, 3).x_query

    assert torch.equal(x(0)[2], x(2)[0])
    for other in (x(2), x(0, seed=1), x(0, split="val")):
        assert not torch.equal(x(0)[0], other[0])


def test_images_are_as_they_are_without_flips_and_shifts():
    _, row, column = channels(LabelledImages(store_of(), "train", examples=20))
    at = torch.arange(SIDE)
    assert torch.equal(row, at[:, None].expand_as(row))
    assert torch.equal(column, at.expand_as(column))


def test_flips_mirror_half_of_the_images_left_to_right():
    _, row, column = channels(LabelledImages(store_of(), "train", examples=1000, flips=True))
    at = torch.arange(SIDE)
    assert torch.equal(row, at[:, None].expand_as(row))
    mirrored = (column == at.flip(0)).flatten(2).all(-1)
    as_drawn = (column == at).flatten(2).all(-1)
    assert (mirrored | as_drawn).all()
    assert mirrored.double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("flips", [False, True])
def test_shifts_move_all_channels_alike_and_repeat_the_edge(flips):
    source = LabelledImages(store_of(), "train", examples=1000, flips=flips, shifts=2)
    grey, row, column = channels(source)
    assert torch.equal(grey, grey[..., :1, :1].expand_as(grey))
    at = torch.arange(SIDE)
    moves = range(-2, 3)
    ways = {m: (at + m).clamp(0, SIDE - 1) for m in moves}
    down = torch.stack([(row == w[:, None]).flatten(2).all(-1) for w in ways.values()])
    right = torch.stack([(column == w).flatten(2).all(-1) for w in ways.values()])
    mirrored = torch.stack([(column == w.flip(0)).flatten(2).all(-1) for w in ways.values()])
    assert (down.sum(0) == 1).all()
    assert (right.sum(0) + mirrored.sum(0) == 1).all()
    assert mirrored.any() == flips
    for move in down, right + mirrored:
        assert move.double().mean((1, 2)).tolist() == pytest.approx([0.2] * 5, abs=0.05)
    # One does not tell the other.
    both = (down[0] & (right[0] | mirrored[0])).double().mean()
    assert both == pytest.approx(1 / 25, abs=0.03)


def test_crops_keep_their_share_and_are_drawn_anew_for_each_image():
    side = 80
    images = torch.zeros(4, 3, side, side, dtype=torch.uint8)
    images[:, 1] = 3 * torch.arange(side)[:, None]
    images[:, 2] = 3 * torch.arange(side)
    store = ClassStore.from_counts(images, [4], ["ramp"])
    source = LabelledImages(store, "train", examples=800, crops=0.25)
    ramps = source.batch(0, 1).x_query[0, :, 1:] * 255 / 3
    rows, columns = ramps[:, 0, :, side // 2], ramps[:, 1, side // 2]
    inner = slice(side // 4, side - side // 4)  # away from the edges, where values repeat
    sides = [v[:, inner].diff(dim=1).mean(1) for v in (rows, columns)]
    area, ratio = sides[0] * sides[1], sides[0] / sides[1]
    assert area.min() > 0.249
    assert area.max() < 1.001
    assert area.mean() == pytest.approx(0.625, abs=0.03)
    assert ratio.min() > 0.749
    assert ratio.max() < 1.335
    assert ratio.log().mean() == pytest.approx(0, abs=0.02)
    for values, share in zip((rows, columns), sides, strict=True):
        middle = (values[:, side // 2] + values[:, side // 2 - 1]) / 2 / (side - 1)
        assert (middle > share / 2 - 0.01).all()
        assert (middle < 1 - share / 2 + 0.01).all()
        assert middle.mean() == pytest.approx(0.5, abs=0.02)
        assert middle.std() > 0.05


def test_colours_vary_by_their_share():
    images = torch.full((1, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    store = ClassStore.from_counts(images, [1], ["grey"])
    source = LabelledImages(store, "train", examples=1000, colours=0.4)
    x = source.batch(0, 1).x_query[0] * 255
    assert torch.allclose(x, x[:, :1, :1, :1].expand_as(x))  # grey stays grey, and even
    brightness = x[:, 0, 0, 0] / 100
    assert brightness.min() == pytest.approx(0.6, abs=0.01)
    assert brightness.max() == pytest.approx(1.4, abs=0.01)
    assert brightness.mean() == pytest.approx(1, abs=0.03)
    images[:, 0] = 200
    vivid = LabelledImages(store, "train", examples=1000, colours=0.4).batch(0, 1).x_query[0]
    saturation = (vivid[:, 0] - vivid[:, 1]).mean((1, 2)) / vivid.mean((1, 2, 3)) / 0.75
    contrast_and_saturation = 1.4 * 1.4
    assert saturation.min() > 0.6 * 0.6 - 0.01
    assert saturation.max() < contrast_and_saturation + 0.01
    assert saturation.std() > 0.2


def test_quarter_turns_are_classes_of_their_own():
    batch = LabelledImages(store_of(), "train", examples=500, rotations="classes").batch(0, 1)
    image = (255 * batch.x_query[:, :, 0, 0, 0]).round().long()
    assert torch.equal(batch.y_query % 4, CLASS_OF_IMAGE[image])
    row = (255 * batch.x_query[0, :, 1]).round().long()
    at = torch.arange(SIDE)[:, None].expand(SIDE, SIDE)
    for example, label in zip(row, batch.y_query[0], strict=True):
        assert torch.equal(example, at.rot90(int(label) // 4))
    assert set(batch.y_query.unique().tolist()) == set(range(16))


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
        ({"examples": 1, "shifts": -1}, "shifts=-1 must be 0 to 4 pixels"),
        ({"examples": 1, "shifts": 5}, "shifts=5 must be 0 to 4 pixels"),
        ({"examples": 1, "crops": 0.0}, "crops=0.0 must be above 0, and 1 at most"),
        ({"examples": 1, "crops": 1.1}, "crops=1.1 must be above 0, and 1 at most"),
        ({"examples": 1, "colours": -0.1}, "colours=-0.1 must be 0 or more, and below 1"),
        ({"examples": 1, "colours": 1.0}, "colours=1.0 must be 0 or more, and below 1"),
    ],
    ids=str,
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        LabelledImages(store_of(), "train", **options)
