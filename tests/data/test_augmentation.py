import pytest
import torch
from torch import Tensor

from fewstep import InputError
from fewstep.data import augmentation as augmentation_module
from fewstep.data.augmentation import UNCHANGED, Augmentation
from fewstep.training.episode_options import ClassificationOptions, SupervisedOptions

SIDE, COUNT = 5, 1000
AT = torch.arange(SIDE)


def placed() -> Tensor:
    """Return images whose channels are the grey 7, a pixel's row, and its column."""
    image = torch.stack(
        [torch.full((SIDE, SIDE), 7), AT[:, None].expand(SIDE, SIDE), AT.expand(5, 5)]
    )
    return image.to(torch.uint8).expand(COUNT, 3, SIDE, SIDE)


def changed(augmentation: Augmentation, x: Tensor, key: int = 3) -> Tensor:
    return augmentation(x, key, torch.arange(len(x))) * 255


def rows_and_columns(augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    grey, row, column = changed(augmentation, placed()).round().long().unbind(1)
    assert (grey == 7).all()
    return row, column


def test_nothing_happens_if_nothing_is_said():
    row, column = rows_and_columns(UNCHANGED)
    assert torch.equal(row, AT[:, None].expand_as(row))
    assert torch.equal(column, AT.expand_as(column))


@pytest.mark.parametrize("options", [ClassificationOptions, SupervisedOptions])
def test_numbers_are_drawn_only_where_they_are_used(options, monkeypatch):
    monkeypatch.setattr(augmentation_module, "random_uniform", lambda *_: pytest.fail("drawn"))
    assert torch.equal(changed(options(), placed()).round(), placed().float())
    flipped = changed(options(flips=True), placed()).round()
    assert not torch.equal(flipped, placed().float())


def test_flips_mirror_half_of_the_images_left_to_right():
    row, column = rows_and_columns(Augmentation(flips=True))
    assert torch.equal(row, AT[:, None].expand_as(row))
    mirrored, as_drawn = ((column == at).flatten(1).all(1) for at in (AT.flip(0), AT))
    assert (mirrored | as_drawn).all()
    assert mirrored.double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("flips", [False, True])
def test_shifts_move_all_channels_alike_and_repeat_the_edge(flips):
    row, column = rows_and_columns(Augmentation(flips=flips, shifts=2))
    ways = [(AT + move).clamp(0, SIDE - 1) for move in range(-2, 3)]
    down = torch.stack([(row == way[:, None]).flatten(1).all(1) for way in ways])
    right = torch.stack([(column == way).flatten(1).all(1) for way in ways])
    mirrored = torch.stack([(column == way.flip(0)).flatten(1).all(1) for way in ways])
    assert (down.sum(0) == 1).all()
    assert (right.sum(0) + mirrored.sum(0) == 1).all()
    assert mirrored.any() == flips
    for move in down, right + mirrored:
        assert move.double().mean(1).tolist() == pytest.approx([0.2] * 5, abs=0.05)
    # One does not tell the other.
    both = (down[0] & (right[0] | mirrored[0])).double().mean()
    assert both == pytest.approx(1 / 25, abs=0.03)


def test_crops_keep_their_share_and_lie_anywhere():
    side = 80
    ramp = 3 * torch.arange(side, dtype=torch.uint8)
    x = torch.stack(torch.broadcast_tensors(ramp[:, None], ramp)).expand(COUNT, 2, side, side)
    found = changed(Augmentation(crops=0.25), x) / 3
    rows, columns = found[:, 0, :, side // 2], found[:, 1, side // 2]
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
    x = torch.full((COUNT, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    grey = changed(Augmentation(colours=0.4), x)
    assert torch.allclose(grey, grey[:, :1, :1, :1].expand_as(grey))  # stays grey, and even
    brightness = grey[:, 0, 0, 0] / 100
    assert brightness.min() == pytest.approx(0.6, abs=0.01)
    assert brightness.max() == pytest.approx(1.4, abs=0.01)
    assert brightness.mean() == pytest.approx(1, abs=0.03)
    x[:, 0], x[:, 1:] = 120, 90
    vivid = changed(Augmentation(colours=0.4), x)
    saturation = (vivid[:, 0] - vivid[:, 1]).mean((1, 2)) / vivid.mean((1, 2, 3)) / 0.3
    assert 0.35 < saturation.min() < 0.5  # of contrast and saturation both
    assert 1.7 < saturation.max() < 1.97
    x[:, :, 0], x[:, :, 1:] = 140, 90  # grey again, brighter above
    split = changed(Augmentation(colours=0.4), x)[:, 0]
    contrast = (split[:, 0] - split[:, 1]).mean(1) / split.mean((1, 2)) / 0.5
    assert contrast.min() > 0.59
    assert contrast.max() < 1.41
    assert contrast.std() == pytest.approx(0.8 / 12**0.5, rel=0.1)


def test_a_change_depends_on_key_and_coordinates_only():
    everything = Augmentation(flips=True, shifts=2, crops=0.5, colours=0.3)
    x = torch.randint(0, 256, (2, 3, 1, 8, 8), dtype=torch.uint8)
    task, place = torch.arange(2)[:, None], torch.arange(3)
    whole = everything(x, 5, task, place)
    for t in range(2):
        for p in range(3):
            one = everything(x[t, p], 5, torch.tensor(t), torch.tensor(p))
            torch.testing.assert_close(one, whole[t, p])
    same = x[:1, :1].expand_as(x)
    alike = everything(same, 5, task, place).flatten(0, 1)
    assert len(alike.unique(dim=0)) == 6
    assert not torch.equal(everything(x, 6, task, place), whole)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"shifts": -1}, "shifts=-1 must be 0 or more pixels"),
        ({"crops": 0.0}, "crops=0.0 must be above 0, and 1 at most"),
        ({"crops": 1.1}, "crops=1.1 must be above 0, and 1 at most"),
        ({"colours": -0.1}, "colours=-0.1 must be 0 or more, and below 1"),
        ({"colours": 1.0}, "colours=1.0 must be 0 or more, and below 1"),
    ],
    ids=str,
)
def test_impossible_changes_are_refused(mistake, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Augmentation(**mistake)
