"""What depends on data alone is computed once, and anew wherever the data could be others."""

import weakref

import torch

from fewstep.core.once import once, one_batch


def counted():
    calls = []

    def total(data, factor):
        calls.append(data)
        return float(data.sum()) * factor

    return total, calls


def test_remembers_the_very_tensor_and_the_arguments_within_a_batch():
    total, calls = counted()
    x = torch.ones(3)
    with one_batch():
        assert [once(total, x, 2), once(total, x, 2), once(total, x, 3)] == [6, 6, 9]
        assert once(total, x.clone(), 2) == 6
    assert len(calls) == 3


def test_tensors_changed_in_place_are_others():
    total, _ = counted()
    x = torch.ones(3)
    with one_batch():
        assert once(total, x, 1) == 3
        x.add_(1)
        assert once(total, x, 1) == 6


def test_of_two_tensors_each_counts():
    def together(a, b):
        calls.append((a, b))
        return torch.cat([a, b])

    calls, x, y = [], torch.ones(2), torch.zeros(2)
    with one_batch():
        assert once(together, x, y) is once(together, x, y)
        y.add_(1)
        assert once(together, x, y).tolist() == [1, 1, 1, 1]
        once(together, x, y.clone())
    assert len(calls) == 3


def test_forgets_with_the_batch():
    total, _ = counted()
    x = torch.ones(3)
    for factor in (1, 2):
        with one_batch():
            assert once(total, x, 1) == 3 * factor
        x.data.mul_(2)  # no version tells of it
    assert [once(total, x, 1), once(total, x, 1)] == [12, 12]


def test_outside_of_a_batch_and_of_inference_tensors_nothing_is_remembered():
    total, calls = counted()
    x = torch.ones(3)
    once(total, x, 1)
    once(total, x, 1)
    with torch.inference_mode(), one_batch():
        y = torch.ones(3)
        once(total, y, 1)
        once(total, y, 1)
    assert len(calls) == 4


def test_data_made_anew_at_each_step_are_let_go():
    alive = []
    with one_batch():
        for _ in range(20):
            x = torch.ones(3)
            once(torch.sum, x)
            alive.append(weakref.ref(x))
        del x
        assert sum(ref() is not None for ref in alive) == 4
