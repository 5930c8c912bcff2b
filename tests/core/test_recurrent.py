"""Recurrent layers step by step against PyTorch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fewstep
from fewstep.core.stand_ins.registry import StandIns
from tests.core.reference import Case, Recurrent, plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS = [
    {},
    {"num_layers": 3},
    {"bias": False, "num_layers": 2},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"num_layers": 2, "dropout": 1.0},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "dropout": 0.4, "bidirectional": True},
]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def tensors_of(outputs: Tensor | tuple) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for each in outputs for t in tensors_of(each)]


def derivatives(module: nn.Module, *inputs) -> list[Tensor]:
    """Return outputs, gradients and gradients of gradients, all by everything."""
    leaves = [*module.parameters(), *(t.requires_grad_() for t in inputs[0:1])]
    outputs = tensors_of(module(*inputs))
    first = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves, create_graph=True)
    loss = sum(t.sin().sum() for t in first)
    second = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [*outputs, *first, *second]


def assert_same(module: nn.Module, *inputs) -> None:
    torch.manual_seed(1)  # of dropout
    expected = derivatives(module, *inputs)
    torch.manual_seed(1)
    with StandIns():
        found = derivatives(module, *inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers(kind, options):
    assert_same(kind(3, 4, **options), torch.randn(5, 2, 3))


def test_layers_in_evaluation_have_no_dropout():
    assert_same(nn.GRU(3, 4, num_layers=2, dropout=1.0).eval(), torch.randn(5, 2, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_projection(bias):
    layer = nn.LSTM(3, 4, num_layers=2, proj_size=2, bias=bias, bidirectional=True)
    assert_same(layer, torch.randn(5, 2, 3))


@every_kind
def test_one_sequence_without_a_batch(kind):
    assert_same(kind(3, 4), torch.randn(5, 3))


def test_a_given_state():
    x, h, c = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    assert_same(nn.GRU(3, 4, num_layers=2), x, h)
    assert_same(nn.LSTM(3, 4, bidirectional=True), x, (h, c))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind, bias):
    assert_same(kind(3, 4, bias=bias), torch.randn(2, 3))
    state = torch.randn(2, 4)
    assert_same(kind(3, 4), torch.randn(2, 3), (state, state) if kind is nn.LSTMCell else state)


def test_relu_cell():
    assert_same(nn.RNNCell(3, 4, nonlinearity="relu"), torch.randn(2, 3))


@every_kind
def test_packed_sequences_are_left_to_pytorch(kind):
    layer, packed = kind(3, 4), pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with StandIns():
        found = layer(packed)[0].data
    assert found.equal(layer(packed)[0].data)


@every_kind
@pytest.mark.parametrize("recipe", [fewstep.maml, fewstep.fomaml])
def test_meta_gradient_of_vectorised_layers(kind, recipe):
    case = Case(lambda: Recurrent(kind(3, 4, batch_first=True)), (5, 3))
    module, batch, algorithm = case.build(), case.batch(), recipe(2, 0.3)
    gradient, _ = fewstep.MetaLearner(module, algorithm, case.loss).meta_gradient(batch)
    expected, *_ = plain_meta_gradient(module, algorithm, case.loss, batch)
    assert relative_error(gradient, expected) < 1e-9


@pytest.mark.parametrize("vectorize", [True, False], ids=["vmap", "loop"])
def test_replay_in_float32(vectorize):
    """PyTorch's fused layer of float32 gives another number of tensors without a gradient."""
    torch.set_default_dtype(torch.float32)
    case = Case(lambda: Recurrent(nn.LSTM(3, 4, batch_first=True)), (5, 3))
    module, batch = case.build(), case.batch()
    found, expected = (
        fewstep.MetaLearner(module, fewstep.fomaml(2, 0.3), case.loss, **options)
        for options in ({"replay": True, "vectorize": vectorize}, {"vectorize": vectorize})
    )
    for _ in range(2):
        again, once = found.meta_gradient(batch)[0], expected.meta_gradient(batch)[0]
        assert all(again[name].equal(once[name]) for name in once)
        assert found.evaluate(batch, 3).loss.equal(expected.evaluate(batch, 3).loss)
