from typing import get_args

import pytest
import torch

from fewstep import InputError
from fewstep.data.augmentation import Augmentation
from fewstep.data.episodes import ClassificationEpisodes, Rotations
from fewstep.data.store import ClassStore

FLIPS = Augmentation(flips=True)
COUNTS = [4, 9, 6, 12, 5, 7]
CLASS_OF_IMAGE = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
CORNER = torch.tensor([[255, 51], [0, 0]], dtype=torch.uint8)  # shows how an image was turned


def store_of(counts=COUNTS) -> ClassStore:
    """Image i has one grey of value i in channel 0, and a corner in channel 1."""
    images = torch.arange(sum(counts), dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 2, 2)
    images[:, 1] = CORNER
    return ClassStore.from_counts(images, counts, [f"class-{c}" for c in range(len(counts))])


def episodes(split="train", ways=3, shots=1, queries=3, **options) -> ClassificationEpisodes:
    return ClassificationEpisodes(
        store_of(), split, ways=ways, shots=shots, queries=queries, **options
    )


def drawn(x: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the images drawn, (tasks, examples)."""
    return (255 * x[:, :, 0, 0, 0]).round().long()


def turns(x: torch.Tensor) -> torch.Tensor:
    """Return by how many quarters each image is turned, 4 more if mirrored, (tasks, examples)."""
    quarters = [CORNER.rot90(k) for k in range(4)]
    turned = torch.stack([each.flatten() for each in (*quarters, *(q.flip(1) for q in quarters))])
    turned = turned / 255
    return (x[:, :, 1].flatten(2)[:, :, None] == turned).all(-1).long().argmax(-1)


def same(one, other) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True)]


every_rotation = pytest.mark.parametrize("rotations", get_args(Rotations))
every_turning = pytest.mark.parametrize(
    "rotations", [r for r in get_args(Rotations) if r != "none"]
)


@every_rotation
def test_an_episode_depends_on_its_number_only(rotations):
    source = episodes(rotations=rotations)
    assert all(same(source.batch(0, 8).batch(3, 2), source.batch(3, 2)))
    assert all(same(episodes(rotations=rotations).batch(3, 2), source.batch(3, 2)))


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "test"}], ids=str)
def test_another_seed_or_split_draws_by_chance_alone(other):
    one, two = (
        episodes(rotations="episode", **options).batch(0, 1000).x_support for options in ({}, other)
    )
    same_class = CLASS_OF_IMAGE[drawn(one)] == CLASS_OF_IMAGE[drawn(two)]
    same_image = (drawn(one) == drawn(two))[same_class]  # of about 7 images
    same_turn = turns(one) == turns(two)
    for agree, chance in ((same_class, 1 / 6), (same_image, 1 / 6), (same_turn, 1 / 4)):
        assert agree.double().mean() == pytest.approx(chance, abs=0.06)


def test_classes_of_an_episode_draw_their_images_apart():
    alike = ClassificationEpisodes(store_of([10] * 4), "train", ways=2, shots=1, queries=1)
    image = drawn(alike.batch(0, 1000).x_support) % 10
    assert (image[:, 0] == image[:, 1]).double().mean() == pytest.approx(0.1, abs=0.04)


def test_drawing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    episodes().batch(0, 5)
    assert torch.equal(torch.get_rng_state(), before)


@every_rotation
@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 3), (5, 2, 1), (6, 3, 1)])
def test_composition_of_an_episode(rotations, ways, shots, queries):
    batch = episodes(ways=ways, shots=shots, queries=queries, rotations=rotations).batch(0, 100)
    assert batch.x_support.shape == (100, ways * shots, 2, 2, 2)
    assert batch.x_query.shape == (100, ways * queries, 2, 2, 2)
    labels = torch.arange(ways)
    assert (batch.y_support == labels.repeat_interleave(shots)).all()
    assert (batch.y_query == labels.repeat_interleave(queries)).all()

    images = torch.cat(
        [drawn(x).unflatten(1, (ways, -1)) for x in (batch.x_support, batch.x_query)], dim=2
    )  # (tasks, ways, shots + queries)
    classes = CLASS_OF_IMAGE[images]
    assert (classes == classes[..., :1]).all(), "a label names one class"
    ordered = images.sort().values
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "no image twice, support or query"
    drawn_classes = classes[..., 0]
    if rotations in ("classes", "mirrored-classes"):  # where a turned class is another class
        drawn_classes = drawn_classes * 8 + turns(batch.x_support)[:, ::shots]
    ordered = drawn_classes.sort().values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "no class twice"


def test_pixels_are_scaled_to_one():
    x = episodes().batch(0, 50).x_query
    assert x.dtype == torch.float32
    assert x[:, :, 1].mul(5).unique().tolist() == [0, 1, 5]
    assert torch.equal(x[:, :, 0, 0, 0], drawn(x) / 255)


def test_every_image_of_every_class_is_drawn_alike():
    """Each class is drawn equally often, however many images it has; so is each of its images."""
    batch = episodes(ways=2, shots=1, queries=3).batch(0, 6000)
    images = torch.cat([drawn(batch.x_support), drawn(batch.x_query)], dim=1)
    counts = torch.bincount(images.flatten(), minlength=sum(COUNTS)).double()
    expected = (6000 * 2 * 4 / 6) / torch.tensor(COUNTS)[CLASS_OF_IMAGE]
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("way", [0, 2])
def test_a_class_takes_any_label(way):
    first = CLASS_OF_IMAGE[drawn(episodes().batch(0, 3000).x_support)[:, way]]
    counts = torch.bincount(first, minlength=6)
    assert (counts - 500).abs().max() < 5 * 500**0.5


@every_turning
def test_a_class_is_turned_as_a_whole(rotations):
    batch = episodes(ways=3, shots=2, queries=2, rotations=rotations).batch(0, 1000)
    support = turns(batch.x_support).unflatten(1, (3, 2))
    query = turns(batch.x_query).unflatten(1, (3, 2))
    both = torch.cat([support, query], dim=2)
    assert (both == both[..., :1]).all()
    ways_to_turn = 8 if rotations == "mirrored-classes" else 4
    expected = 1000 / ways_to_turn
    for way in range(3):
        counts = torch.bincount(both[:, way, 0], minlength=ways_to_turn)
        assert len(counts) == ways_to_turn
        assert (counts - expected).abs().max() < 5 * expected**0.5
    alike = (both[:, 0, 0] == both[:, 1, 0]).double().mean()
    assert alike == 1 if rotations == "together" else alike < 0.3, "each on its own"


def mirrored(x: torch.Tensor) -> torch.Tensor:
    """Return which images, none of them turned, are mirrored left to right, (tasks, examples)."""
    marks = (CORNER / 255, CORNER.flip(-1) / 255)
    alike = torch.stack([(x[:, :, 1] == mark).flatten(2).all(-1) for mark in marks])
    assert (alike.sum(0) == 1).all(), "as drawn, or mirrored left to right"
    return alike[1]


def test_each_image_is_mirrored_for_itself():
    batch = episodes(ways=3, shots=2, queries=2, augmentation=FLIPS).batch(0, 1000)
    both = torch.cat([mirrored(batch.x_support), mirrored(batch.x_query)], dim=1)
    assert (both.sum(0) - 500).abs().max() < 5 * 250**0.5, "half of the images of every place"
    correlation = torch.corrcoef(both.double().T) - torch.eye(12)
    assert correlation.abs().max() < 5 / 1000**0.5, "whatever the others"
    plain = episodes(ways=3, shots=2, queries=2).batch(0, 1000)
    assert torch.equal(drawn(batch.x_query), drawn(plain.x_query)), "the images drawn are the same"
    assert not mirrored(plain.x_support).any()


def test_mirroring_an_image_depends_on_its_episode_only():
    source = episodes(augmentation=FLIPS)
    assert all(same(source.batch(0, 8).batch(3, 2), source.batch(3, 2)))
    one, two = (
        mirrored(episodes(augmentation=FLIPS, seed=s).batch(0, 500).x_query) for s in (0, 1)
    )
    assert (one == two).double().mean() == pytest.approx(0.5, abs=0.05)


def test_a_shift_as_wide_as_the_images_is_refused():
    assert len(episodes(augmentation=Augmentation(shifts=1)).batch(0, 2)) == 2
    with pytest.raises(InputError, match=r"^shifts=2 must be 0 to 1 pixels of these images$"):
        episodes(augmentation=Augmentation(shifts=2))


def test_nothing_is_turned_by_default():
    batch = episodes().batch(0, 20)
    assert not turns(batch.x_support).any()
    assert not turns(batch.x_query).any()


@pytest.mark.parametrize(("rotations", "classes"), [("classes", 24), ("mirrored-classes", 48)])
def test_turned_classes_are_four_or_eight_times_as_many(rotations, classes):
    assert len(episodes(ways=classes, rotations=rotations).batch(0, 2)) == 2
    with pytest.raises(InputError, match=f"^ways={classes + 1} asks .* than the {classes} .*$"):
        episodes(ways=classes + 1, rotations=rotations)


def test_a_part_of_a_store_holds_its_own_classes():
    part = store_of().select([5, 1, 3])
    assert (len(part), part.names) == (3, ("class-5", "class-1", "class-3"))
    batch = ClassificationEpisodes(part, "val", ways=3, shots=2, queries=5).batch(0, 200)
    images = drawn(torch.cat([batch.x_support, batch.x_query], dim=1))
    assert set(images.unique().tolist()) == set(
        torch.isin(CLASS_OF_IMAGE, torch.tensor([5, 1, 3])).nonzero()[:, 0].tolist()
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"ways": 0}, "ways=0 must be at least 1"),
        ({"shots": 0}, "shots=0 must be at least 1"),
        ({"queries": -1}, "queries=-1 must be at least 1"),
        ({"rotations": "class"}, "unknown rotations 'class'; did you mean 'classes'"),
        ({"ways": 7}, "ways=7 asks for more classes than the 6 of the train split"),
        (
            {"shots": 2, "queries": 3},
            "shots=2 and queries=3 need 5 images of every class, but class class-0 of the train "
            "split has 4",
        ),
    ],
    ids=str,
)
def test_refuses(mistake, message):
    with pytest.raises(InputError, match=f"^{message}.*$"):
        episodes(**mistake)


@every_turning
def test_turning_needs_squares(rotations):
    oblong = ClassStore.from_counts(torch.zeros(8, 1, 2, 3, dtype=torch.uint8), [4, 4], "ab")
    with pytest.raises(InputError, match=f"^rotations='{rotations}' .* are 2x3; .*$"):
        ClassificationEpisodes(oblong, "train", ways=2, shots=1, queries=1, rotations=rotations)
    ClassificationEpisodes(oblong, "train", ways=2, shots=1, queries=1).batch(0, 1)
