"""Recorded operations, replayed, give the same numbers to the bit."""

import copy
import io
import math
import pickle
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewstep
from fewstep import DerivativeAnnealing, FixedOrder, InputError, MetaLearner, MultiStepLoss
from fewstep.core.recorder import Recorder
from fewstep.core.replay import Replay, _CudaGraph, _dense, _Kept
from tests.core.reference import MODELS, Case, numbers
from tests.core.test_checkpointing import ALGORITHMS

pytestmark = pytest.mark.usefixtures("float64")


def train(case: Case, algorithm, *, replay: bool, iterations: int = 3, **options):
    """Return the state after some iterations, and the metrics of each."""
    torch.manual_seed(0)
    learner = MetaLearner(case.build(), algorithm, case.loss, replay=replay, **options)
    seen = []
    for i in range(iterations):
        torch.manual_seed(i)
        seen += numbers(learner.step(case.batch()))
    return learner.state_tensors(), seen


def assert_equal_to_the_bit(case: Case, algorithm, **options) -> None:
    (state, seen), (wanted, wanted_seen) = (
        train(case, algorithm, replay=replay, **options) for replay in (True, False)
    )
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted_seen, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm(algorithm):
    assert_equal_to_the_bit(MODELS["batch norm"], algorithm, iterations=2)


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_every_model(case):
    assert_equal_to_the_bit(case, fewstep.maml(2, 0.1), iterations=2)


def assert_tests_equal_to_the_bit(name, scores_of) -> None:
    """Compare what tests give with and without replay, after an update and after another."""
    case, found = MODELS[name], []
    algorithm = fewstep.maml_plus_plus(3, 0.1, version="reference_code")
    for replay in (True, False):
        torch.manual_seed(0)
        learner = MetaLearner(case.build(), algorithm, case.loss, chunk_size=2, replay=replay)
        batch = case.batch(5)  # 2 tasks, 2, and 1
        of_replay = []
        for _ in range(2):
            before = learner.state_tensors()
            learner.step(batch)  # parameters are read anew
            of_replay += scores_of(learner, batch, before)
        found.append(of_replay)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_testing_every_model(name):
    def scores_of(learner, batch, before):
        scores = learner.evaluate(batch, 5)
        return scores.loss, scores.metric

    assert_tests_equal_to_the_bit(name, scores_of)


@pytest.mark.parametrize(
    ("name", "use"), [("batch norm", "batch"), ("batch norm", "support"), ("Conv4", "running")]
)
def test_testing(name, use):
    def scores_of(learner, batch, before):
        scores = learner.evaluate(batch, 5, statistics=use)
        few = learner.evaluate(batch, 5, num_steps=1, statistics=use)
        last = learner.evaluate(batch, 5, statistics=use, every_step=False)
        assert torch.equal(last.loss, scores.loss[:, -1:])
        assert torch.equal(last.metric, scores.metric[:, -1:])
        outputs = learner.predict(batch, 5, statistics=use)
        states = [before, learner.state_tensors()]
        both = learner.evaluate_ensemble(states, batch, 5, statistics=use)
        return scores.loss, scores.metric, few.loss, outputs, last.loss, both.loss

    assert_tests_equal_to_the_bit(name, scores_of)


def test_testing_is_recorded_the_second_time_for_each_shape():
    case = MODELS["mlp"]
    learner = MetaLearner(case.build(), fewstep.maml(2), case.loss, chunk_size=2, replay=True)
    recordings = []
    for tasks in (2, 4, 5, 5, 5):  # by 2 and, at the end, by 1
        learner.evaluate(case.batch(5), tasks)
        recordings.append(len(learner._test_replay._recordings))
    assert recordings == [0, 1, 1, 2, 2]


def test_a_loop_over_the_tasks():
    assert_equal_to_the_bit(MODELS["batch norm"], fewstep.maml(2, 0.1), vectorize=False)


def test_schedules_go_on():
    # Query weights change for 2 iterations, the order at the 4th.
    algorithm = replace(
        fewstep.maml_plus_plus(2, iterations_per_epoch=1),
        query_weights=MultiStepLoss(2),
        derivative_order=DerivativeAnnealing(4),
    )
    assert_equal_to_the_bit(MODELS["mlp"], algorithm, iterations=6)


def test_it_records_once_for_each_phase_and_shape(monkeypatch):
    recorded = []

    class Counted(Recorder):
        def __enter__(self):
            recorded.append(self)
            return super().__enter__()

    monkeypatch.setattr("fewstep.core.replay.Recorder", Counted)
    case = MODELS["mlp"]
    train(case, fewstep.maml(2, 0.1), replay=True, iterations=4)
    assert len(recorded) == 1
    train(case, fewstep.maml(2, 0.1), replay=True, iterations=4, chunk_size=2)  # 2 tasks, and 1
    assert len(recorded) == 1 + 2
    annealed = replace(
        fewstep.maml_plus_plus(2, iterations_per_epoch=2),
        query_weights=MultiStepLoss(2),
        derivative_order=DerivativeAnnealing(3),
    )
    train(case, annealed, replay=True, iterations=8)  # other weights are no other operations
    assert len(recorded) == 1 + 2 + 3


def test_dropout_draws_anew_each_time():
    case = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6,))
    assert_equal_to_the_bit(case, fewstep.maml(2, 0.1))
    learner = MetaLearner(case.build(), fewstep.maml(1, 0.1), case.loss, replay=True)
    batch = case.batch()
    first, second = (learner.meta_gradient(batch)[0] for _ in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_it_reads_parameters_anew():
    x = torch.ones(3, requires_grad=True)
    replay = Replay()

    def square(y: Tensor) -> Tensor:
        return torch.autograd.grad((x * x * y).sum(), x)[0]

    y = torch.ones(3)
    assert replay(square, y, key=()).tolist() == [2, 2, 2]
    with torch.no_grad():
        x.mul_(5)
    again = replay(square, 2 * y, key=())
    assert again.tolist() == [20, 20, 20]
    assert not again.requires_grad


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_it_reads_parameters_where_they_are(name):
    case = MODELS[name]
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, fewstep.maml(1), case.loss, replay=True)
    learner.meta_gradient(batch)
    assert len(learner._replay._recordings) == 1
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data + 1
    found, metrics = learner.meta_gradient(batch)
    expected, of_expected = MetaLearner(module, fewstep.maml(1), case.loss).meta_gradient(batch)
    torch.testing.assert_close(metrics.loss, of_expected.loss, rtol=0, atol=0)
    for each, gradient in expected.items():
        torch.testing.assert_close(found[each], gradient, rtol=0, atol=0)
    assert len(learner._replay._recordings) == 1


class Deciding(nn.Module):
    """Looks at its input before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum() > 0 else -x)


def test_a_module_that_looks_at_values_is_refused():
    case = replace(MODELS["mlp"], build=Deciding)
    learner = MetaLearner(
        case.build(), fewstep.maml(1), F.cross_entropy, vectorize=False, replay=True
    )
    with pytest.raises(InputError, match=r"^the module, its loss or its metric decides .*$"):
        learner.meta_gradient(case.batch())


@pytest.mark.parametrize("name", ["batch norm", "transformer"])
def test_segments_of_steps(name):
    assert_equal_to_the_bit(MODELS[name], fewstep.maml(3, 0.1), checkpoint_every=2)


def test_infinity_is_recorded():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(x[:, :3] > 1, -math.inf)

    def loss(outputs, targets):
        return outputs.softmax(-1).square().sum()

    assert_equal_to_the_bit(Case(lambda: Masked(6, 3), (6,), loss=loss), fewstep.maml(1, 0.1))


def test_a_recording_is_for_its_kinds_of_tensors():
    replay = Replay()
    for dtype in (torch.float32, torch.float64, torch.float32):
        ones = torch.ones(2, dtype=dtype)
        assert replay(torch.zeros_like, ones, key="key").dtype == dtype
    assert len(replay._recordings) == 2


def test_a_replay_has_no_graph():
    replay, x = Replay(), torch.ones(2, requires_grad=True)
    for _ in range(2):
        assert not replay(lambda x: 2 * x, x, key="key").requires_grad


def test_the_oldest_recordings_are_forgotten():
    replay = Replay()
    for key in range(30):
        replay(lambda x: 2 * x, torch.ones(2), key=key)
    assert len(replay._recordings) == 16


def test_a_replay_lets_go_of_what_it_has_used():
    recorder = Recorder((x := torch.ones(2),), may_draw=True)
    with recorder:
        y = ((x * 2).exp() + 1).sqrt()
    recording = recorder.end({"y": y})
    v = [x, *[None] * (recording.slots - 1)]
    for part in recording.parts:
        part(v, recording.constants)
    assert sum(t is not None for t in v) == 1


@dataclass(frozen=True)
class OneStepLater:
    """The query loss of step 1 counts in the first iteration, that of step 2 in the second."""

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        return (0.0, 1.0, 0.0) if epoch == 0 else (0.0, 0.0, 1.0)


def test_other_steps_count_in_the_second_iteration():
    algorithm = replace(fewstep.maml(2, 0.1), query_weights=OneStepLater(), iterations_per_epoch=1)
    assert_equal_to_the_bit(MODELS["mlp"], algorithm)


def test_the_first_order_has_no_segments():
    case = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6,))
    assert_equal_to_the_bit(case, fewstep.fomaml(2, 0.1), checkpoint_every=1)


def test_dropout_in_segments_is_refused():
    case = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6,))
    learner = MetaLearner(case.build(), fewstep.maml(2), case.loss, checkpoint_every=1, replay=True)
    with pytest.raises(InputError, match=r"draws random numbers, .* leave out checkpoint_every"):
        learner.meta_gradient(case.batch())


def test_orders_are_recorded_apart():
    case = MODELS["mlp"]
    for order in (1, 2):
        assert_equal_to_the_bit(case, replace(fewstep.maml(2), derivative_order=FixedOrder(order)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_recording_trains_alike():
    case, algorithm = MODELS["sinusoid MLP"], fewstep.maml(1, 0.1)
    state, seen = train(case, algorithm, replay=True, compile=True)
    wanted, wanted_seen = train(case, algorithm, replay=True)
    for a, b in zip([*state.values(), *seen], [*wanted.values(), *wanted_seen], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_gradient_of_rounding_errors_alone_is_compiled():
    before_norm = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()]
    case = Case(lambda: nn.Sequential(*before_norm, nn.Linear(8, 3)), (4,))
    _, seen = train(case, fewstep.maml(1, 0.1), replay=True, compile=True)
    assert all(each.isfinite().all() for each in seen)


def miscompile(function, **_):
    return lambda *arguments: [1.001 * each for each in function(*arguments)]


def fail_to_compile(function, **_):
    def compiled(*_):
        raise RuntimeError("no compiler")

    return compiled


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (miscompile, r"^torch.compile gives other numbers .* leave out compile=True$"),
        (fail_to_compile, r"^torch.compile fails .* \(no compiler\); leave out compile=True$"),
    ],
)
def test_a_compiler_that_errs_is_found_out(monkeypatch, compiler, message):
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.raises(InputError, match=message):
        train(MODELS["mlp"], fewstep.maml(1), replay=True, compile=True)


def test_what_compiling_needs():
    dropout = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(InputError, match=r"draws random numbers"):
        train(
            replace(MODELS["mlp"], build=lambda: dropout),
            fewstep.maml(1),
            replay=True,
            compile=True,
        )
    with pytest.raises(InputError, match=r"^compile=True compiles what replay=True records"):
        train(MODELS["mlp"], fewstep.maml(1), replay=False, compile=True)


def test_a_graph_of_a_gpu_has_arguments_without_gaps():
    x = torch.randn(3, 8, 2)
    part, whole, image = x[:, :4], torch.randn(5), torch.randn(2, 3, 4, 4)
    last = image.to(memory_format=torch.channels_last)
    found = _dense((part, whole, part, last))
    assert found[0].is_contiguous()
    assert torch.equal(found[0], part)
    assert found[2] is found[0]  # recordings know that they are one
    assert found[1] is whole
    assert found[3] is last


def test_a_graph_of_a_gpu_is_captured_anew_for_other_numbers():
    """A CPU scalar that a kernel is given is an argument of the graph."""
    weight = torch.tensor(0.5)
    graph = object.__new__(_CudaGraph)
    outside = [(weight, weight.data_ptr())]
    kept, on_the_host = _Kept.of(graph, outside), _Kept.of(None, outside)
    assert kept.is_valid()
    weight.fill_(0.7)
    assert not kept.is_valid()
    assert on_the_host.is_valid()  # which reads it anew


def test_a_capture_that_fails_says_why_and_leaves_the_stream():
    """PyTorch fails to end it, too, and stays on the capture's own stream."""

    @contextmanager
    def capture(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("failed due to a previous error during capture")

    def recording(_):
        if len(calls) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append("before")

    calls, nothing = [], lambda *_: nullcontext()
    streams = {"Stream": mock.MagicMock(), "current_stream": mock.MagicMock()}
    with (
        mock.patch.multiple(
            torch.cuda, CUDAGraph=mock.MagicMock(), graph=capture, stream=nothing, device=nothing,
            set_stream=mock.MagicMock(), **streams,
        ),
        mock.patch.object(torch.random, "fork_rng", return_value=nullcontext()),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"\(operation not permitted .* in a new process$"):
            _CudaGraph(recording, (torch.zeros(2),))
        torch.cuda.set_stream.assert_called_once_with(streams["current_stream"].return_value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_on_a_gpu_tasks_may_be_parts_of_others():
    case, found = MODELS["sinusoid MLP"], []
    for options in ({"compile": True}, {}):
        torch.manual_seed(0)
        learner = MetaLearner(
            case.build().cuda(), fewstep.maml(1, 0.1), case.loss, replay=True, **options
        )
        for i in range(3):
            torch.manual_seed(i)
            batch = case.batch().to("cuda")
            apart = (torch.stack([t, t], 2)[:, :, 0] for t in batch.tensors())
            found.append(learner.step(fewstep.TaskBatch(*apart)).task_loss)
    for i in range(3):
        torch.testing.assert_close(found[i], found[i + 3], rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_recording_is_a_graph_and_trains_alike():
    case, algorithm = MODELS["batch norm"], fewstep.maml_plus_plus(3, 0.1)
    states = []
    for replay in (True, False):
        torch.manual_seed(0)
        learner = MetaLearner(
            case.build().cuda(), algorithm, case.loss, chunk_size=2, replay=replay
        )
        for i in range(3):
            torch.manual_seed(i)
            learner.step(case.batch().to("cuda"))
        states.append(learner.state_tensors())
        if learner._replay is not None:
            found = learner._replay._recordings.values()
            assert found
            assert all(isinstance(each.run, _CudaGraph) for each in found)
    for name, expected in states[1].items():
        torch.testing.assert_close(states[0][name], expected, rtol=1e-9, atol=1e-12)


def mse_into_a_new_tensor(outputs: Tensor, y: Tensor) -> Tensor:
    total = torch.tensor(0.0)
    total += F.mse_loss(outputs, y)
    return total


def mse_by_halved_weights(outputs: Tensor, y: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 3.0])
    weights /= 2
    return ((outputs - y).square() * weights).mean()


@pytest.mark.parametrize(
    ("loss", "vectorize"),
    [(mse_into_a_new_tensor, False), (mse_by_halved_weights, False), (mse_by_halved_weights, True)],
)
def test_tensors_made_of_numbers_are_new_each_time(loss, vectorize):
    module, x, y = nn.Linear(3, 2), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 2)
    batch = fewstep.TaskBatch(x[0], y[0], x[1], y[1])
    found = []
    for replay in (False, True):
        learner = MetaLearner(
            module, fewstep.maml(2, 0.1), loss, replay=replay, vectorize=vectorize
        )
        for _ in range(3):
            gradients, metrics = learner.meta_gradient(batch)
            found.append([*gradients.values(), metrics.loss])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def masked(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square()[y > 0].mean()


def selected(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().masked_select(y > 0).mean()


def by_numpy(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.mean() - float(y.numpy().mean())).square()


def by_list(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.mean() - sum(map(sum, y.tolist()))).square()


def by_list_of(make):
    """Return a loss whose weights are made of a list of tensors, as those of classes are."""
    return lambda outputs, y: (outputs - y).square().mean(0) @ make([t.square().sum() for t in y.T])


def by_copy(copied):
    """Return a loss by a copy of the targets."""
    return lambda outputs, y: (outputs - copied(y)).square().mean()


def saved(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


PAST_THE_DISPATCHER = {
    "masked": masked,
    "selected": selected,
    "numpy": by_numpy,
    "tolist": by_list,
    "tensor": by_list_of(torch.tensor),
    "tensor of data": by_list_of(lambda each: torch.tensor(data=each)),
    "tensor of pairs": by_list_of(lambda each: torch.tensor([(t, 1) for t in each])[:, 0]),
    "as_tensor": by_list_of(torch.as_tensor),
    "asarray": by_list_of(torch.asarray),
    "new_tensor": by_list_of(lambda each: each[0].new_tensor(each)),
    "DoubleTensor": by_list_of(torch.DoubleTensor),
    "Tensor": by_list_of(lambda each: torch.Tensor(each).double()),
    "deepcopy": by_copy(copy.deepcopy),
    "copy": by_copy(copy.copy),
    "pickle": by_copy(lambda y: pickle.loads(pickle.dumps(y))),
    "save": by_copy(saved),
    "from_dlpack": by_copy(lambda y: torch.from_numpy(np.from_dlpack(y).copy())),
    "storage": by_copy(lambda y: torch.tensor(y.untyped_storage().tolist()).sum()),
    "text": by_copy(lambda y: float(str(y.mean())[7:-1])),
    "formatted": by_copy(lambda y: float(f"{y[:1, 0]}"[8:-2])),
}


@pytest.mark.parametrize("loss", PAST_THE_DISPATCHER.values(), ids=PAST_THE_DISPATCHER)
def test_what_depends_on_values_is_refused(loss):
    module, x, y = nn.Linear(3, 2), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 2)
    batch = fewstep.TaskBatch(x[0], y[0], x[1], y[1])
    learner = MetaLearner(module, fewstep.maml(1, 0.1), loss, vectorize=False)
    learner.step(batch)
    learner = MetaLearner(module, fewstep.maml(1, 0.1), loss, vectorize=False, replay=True)
    with pytest.raises(InputError, match="pass replay=False"):
        learner.step(batch)


by_data = by_copy(lambda y: y.data)
by_itself = by_copy(torch.as_tensor)
by_numbers = by_list_of(lambda each: torch.tensor([1.0, 2.0]) * torch.stack(each))


@pytest.mark.parametrize("loss", [by_data, by_itself, by_numbers])
def test_what_reads_no_values_is_recorded(loss):
    module = nn.Linear(3, 2)
    learners = [
        MetaLearner(module, fewstep.maml(2, 0.1), loss, vectorize=False, replay=replay)
        for replay in (False, True)
    ]
    for _ in range(3):
        x, y = torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 2)
        batch = fewstep.TaskBatch(x[0], y[0], x[1], y[1])
        expected, found = (each.meta_gradient(batch)[0] for each in learners)
        assert all(torch.equal(found[n], g) for n, g in expected.items())


def test_indexing_by_numbers_is_recorded():
    def first(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square()[torch.tensor([0, 2])].mean()

    module, x, y = nn.Linear(3, 2), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 4, 2)
    batch = fewstep.TaskBatch(x[0], y[0], x[1], y[1])
    losses = [
        MetaLearner(module, fewstep.maml(1, 0.1), first, replay=replay).meta_gradient(batch)[1].loss
        for replay in (False, True)
    ]
    assert losses[0] == losses[1]


def test_arguments_that_are_one_tensor_are_told_from_others():
    """As in Reptile's batches, whose query sets are the support sets themselves."""
    case = MODELS["mlp"]
    one, two = case.batch(), case.batch()
    same = fewstep.TaskBatch(one.x_support, one.y_support, one.x_support, one.y_support)
    module = case.build()
    for batches in ((same, two), (two, same)):
        learners = [MetaLearner(module, fewstep.maml(2, 0.1), case.loss, replay=r) for r in (0, 1)]
        for batch in batches:
            plain, replayed = (each.meta_gradient(batch) for each in learners)
            assert all(torch.equal(replayed[0][n], g) for n, g in plain[0].items())
            assert torch.equal(replayed[1].task_loss, plain[1].task_loss)


def test_a_part_exchanged_or_hooked_is_recorded_anew():
    case = MODELS["mlp"]
    module, batch = case.build(), case.batch()
    learner = MetaLearner(module, fewstep.maml(2, 0.1), case.loss, replay=True)

    def is_right() -> bool:
        plain = MetaLearner(module, fewstep.maml(2, 0.1), case.loss)
        found, wanted = (each.meta_gradient(batch)[0] for each in (learner, plain))
        return all(torch.equal(found[name], g) for name, g in wanted.items())

    assert is_right()
    place = next(n for n, part in module.named_children() if not list(part.parameters()))
    setattr(module, place, nn.Softplus())
    assert is_right()
    hook = module.register_forward_hook(lambda _, __, output: 2 * output)
    assert is_right()
    hook.remove()
    assert is_right()
    for factor in (1, 2, 3, 1):  # each hook may get the address of the one before
        hook = module.register_forward_hook(lambda _, __, output, by=factor: by * output)
        assert is_right()
        hook.remove()
        del hook
