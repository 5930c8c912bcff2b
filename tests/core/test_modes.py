"""Every way to compute a meta-gradient, in every precision and on every device, against one."""

import copy
from dataclasses import replace

import pytest
import torch

from fewstep import MetaLearner, TaskBatch, fomaml, maml
from tests.core.reference import MODELS, plain_meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("float64")

MODES = {
    "plain": {},
    "chunks": {"chunk_size": 2},
    "checkpoints": {"checkpoint_every": 1},
    "replay": {"replay": True},
    "all": {"chunk_size": 1, "checkpoint_every": 2, "replay": True},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("name", ["batch norm", "Conv4", "sinusoid MLP"])
@pytest.mark.parametrize("recipe", [maml, fomaml])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
def test_the_meta_gradient_is_that_of_a_plain_float64_loop(name, recipe, mode, dtype, device):
    case, algorithm = MODELS[name], recipe(num_steps=3, inner_lr=0.1)
    module, batch = case.build(), case.batch()
    expected, meta_loss, _ = plain_meta_gradient(copy.deepcopy(module), algorithm, case.loss, batch)

    given = [t.to(dtype) if t.is_floating_point() else t for t in batch.tensors()]
    batch = TaskBatch(*given).to(device)
    learner = MetaLearner(module.to(device, dtype), algorithm, case.loss, **mode)
    learner.meta_gradient(replace(batch, x_support=batch.x_support / 2))  # is recorded
    gradient, metrics = learner.meta_gradient(batch)

    assert {g.dtype for g in gradient.values()} == {dtype}
    on_cpu = {parameter: g.cpu().double() for parameter, g in gradient.items()}
    assert relative_error(on_cpu, expected) < TOLERANCE[dtype]
    assert float(metrics.loss) == pytest.approx(float(meta_loss), rel=TOLERANCE[dtype])
