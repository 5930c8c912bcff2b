import torch

from fewstep.data.changes import mirror, shift, turn

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
