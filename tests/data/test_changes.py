import torch

from fewstep.data.changes import crop, mirror, recolour, shift, turn

X = torch.arange(9).reshape(1, 1, 3, 3).repeat(2, 1, 1, 1)  # two images of one channel


def rows(x: torch.Tensor) -> list[list[int]]:
    return x[0].tolist()


def test_each_image_is_turned_mirrored_and_shifted_by_its_own_number():
    whole = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    nothing, one = torch.tensor([0, 0]), torch.tensor([0, 1])
    for changed, expected in (
        (turn(X, one), [[2, 5, 8], [1, 4, 7], [0, 3, 6]]),
        (turn(X, 2 * one), [[8, 7, 6], [5, 4, 3], [2, 1, 0]]),
        (mirror(X, one == 1), [[2, 1, 0], [5, 4, 3], [8, 7, 6]]),
        (shift(X, one, nothing), [[3, 4, 5], [6, 7, 8], [6, 7, 8]]),
        (shift(X, nothing, one), [[1, 2, 2], [4, 5, 5], [7, 8, 8]]),
        (shift(X, -2 * one, -one), [[0, 0, 1], [0, 0, 1], [0, 0, 1]]),
    ):
        assert rows(changed[0]) == whole
        assert rows(changed[1]) == expected


def test_numbers_broadcast_over_the_images_of_a_class():
    x = torch.rand(2, 3, 4, 1, 3, 3)  # tasks, ways, images
    quarters = torch.tensor([[0, 1, 2], [3, 0, 1]])
    found = turn(x, quarters[..., None])
    for task in range(2):
        for way in range(3):
            expected = x[task, way].rot90(int(quarters[task, way]), (-2, -1))
            assert torch.equal(found[task, way], expected)


def test_a_crop_is_the_rectangle_stretched_to_the_whole():
    side = 40
    ramp = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    x = torch.stack(torch.broadcast_tensors(ramp[:, None], ramp)).expand(2, 2, side, side)
    top, left = torch.tensor([0.0, 0.25]), torch.tensor([0.0, 0.5])
    height, width = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.25])
    whole, part = crop(x, top, left, height, width).double()
    torch.testing.assert_close(whole, x[0])
    torch.testing.assert_close(part[0], (0.25 + 0.5 * ramp)[:, None].expand(side, side))
    torch.testing.assert_close(part[1], (0.5 + 0.25 * ramp).expand(side, side))


def test_a_crop_repeats_the_edge_where_it_ends():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    zero, half = torch.tensor([0.0]), torch.tensor([0.5])
    corner = crop(x, zero, zero, half, half)
    assert corner[0, 0, 0].tolist() == [0.0, 0.25, 0.75]  # centres at -0.25, 0.25 and 0.75
    assert corner[0, 0, :, 0].tolist() == [0.0, 0.75, 2.25]


def test_colours_are_changed_by_factors():
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64) * 0.5 + 0.25
    one, zero, half = torch.ones(4), torch.zeros(4), torch.full((4,), 0.5)
    mean = x.mean((1, 2, 3), keepdim=True).expand_as(x)
    grey = x.mean(1, keepdim=True).expand_as(x)
    for factors, expected in (
        ((one, one, one), x),
        ((half, one, one), x / 2),
        ((one, half, one), (x + mean) / 2),
        ((one, zero, one), mean),
        ((one, one, half), (x + grey) / 2),
        ((one, one, zero), grey),
        ((half, half, zero), (grey + mean) / 4),
        ((4 * one, one, one), (4 * x).clamp(max=1)),
    ):
        torch.testing.assert_close(recolour(x, *factors), expected)
    mixed = recolour(x, torch.tensor([0.5, 1, 1, 1]), torch.tensor([1, 0, 1, 1]), one)
    torch.testing.assert_close(mixed, torch.stack([x[0] / 2, mean[1], x[2], x[3]]))
