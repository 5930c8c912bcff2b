import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import fewstep
from fewstep import MetaLearner, maml
from fewstep.core.errors import InputError
from fewstep.core.inner_step import GradientStep
from fewstep.data.folder import ImageFolder
from fewstep.data.omniglot import Omniglot
from fewstep.models.features import projection_of
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.build import Experiment
from fewstep.training.config import to_dict
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.initial import check_source, check_unseen, read_initial, start_from
from fewstep.training.network_options import Conv4Options
from fewstep.training.parse import run_config
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder
from tests.data.conftest import write_images


def network(ways=3, filters=4) -> torch.nn.Module:
    torch.manual_seed(ways + filters)
    return Conv4Options(filters).build((1, 16, 16), ways)


def start(module: torch.nn.Module, initial: dict[str, torch.Tensor]) -> None:
    start_from(MetaLearner(module, maml(inner_lr=0.1), F.cross_entropy), initial)


def test_what_fits_is_taken_and_the_rest_is_left(tmp_path):
    source, own = network(ways=7), network()
    source.blocks[0].norm.running_mean.fill_(5)
    before = {name: t.clone() for name, t in own.state_dict().items()}
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    start(own, read_initial(tmp_path / "weights.safetensors"))
    for name, tensor in own.state_dict().items():
        is_head = name.startswith("head.")
        assert torch.equal(tensor, before[name] if is_head else source.state_dict()[name]), name
    assert not torch.equal(own.blocks[0].conv.weight, before["blocks.0.conv.weight"])


def test_a_bias_alone_is_no_head():
    source, own = Conv4Options(4).build((1, 32, 32), 3), network(ways=3)
    torch.nn.init.ones_(source.head.bias)
    start(own, source.state_dict())
    assert not own.head.bias.any()
    assert torch.equal(own.blocks[3].conv.weight, source.blocks[3].conv.weight)


@pytest.mark.parametrize("heads", [("cosine", "linear"), ("linear", "cosine")])
def test_a_head_of_another_kind_is_left(heads):
    source, own = (Conv4Options(4, head=head).build((1, 16, 16), 3) for head in heads)
    before = {name: t.clone() for name, t in own.head.state_dict().items()}
    start(own, source.state_dict())
    for name, tensor in own.head.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(own.blocks[3].conv.weight, source.blocks[3].conv.weight)


@pytest.mark.parametrize(("classes", "taken"), [(4, True), (3, False)])
def test_a_projection_is_taken_from_a_head_of_as_many_classes_as_features(classes, taken):
    source = network(ways=classes)
    own = Conv4Options(4, projection=True).build((1, 16, 16), 3)
    start(own, source.state_dict())
    expected = projection_of(source.head.weight.detach()) if taken else torch.eye(4)
    assert torch.equal(own.blocks.projection.weight, expected)
    assert torch.equal(own.blocks[3].conv.weight, source.blocks[3].conv.weight)


def test_lengths_of_a_cosine_heads_directions_say_nothing():
    source = Conv4Options(4, head="cosine").build((1, 16, 16), 9)
    own, longer = (Conv4Options(4, projection=True).build((1, 16, 16), 3) for _ in range(2))
    start(own, source.state_dict())
    with torch.no_grad():
        source.head.weight.mul_(torch.arange(1.0, 10.0)[:, None])
    start(longer, source.state_dict())
    expected = own.blocks.projection.weight
    torch.testing.assert_close(longer.blocks.projection.weight, expected)
    assert not torch.equal(expected, torch.eye(4))


def test_a_projection_that_was_learned_is_kept():
    source, own = (Conv4Options(4, projection=True).build((1, 16, 16), 9) for _ in range(2))
    torch.nn.init.normal_(source.blocks.projection.weight)
    start(own, source.state_dict())
    assert torch.equal(own.blocks.projection.weight, source.blocks.projection.weight)
    with pytest.raises(
        InputError, match=r"another network: `blocks\.projection\.weight`, \(4, 4\)"
    ):
        start(network(ways=9), source.state_dict())


@pytest.mark.parametrize("recipe", ["maml", "maml++"])
def test_a_run_starts_from_the_best_checkpoint_of_another(tmp_path, recipe, own_cache):
    source = Conv4Options(filters=16).build((3, 28, 28), 7)
    run = RunFolder.create(tmp_path, {})
    tensors = {f"model.{name}": t for name, t in source.state_dict().items()}
    state = run.save_checkpoint(tensors, None, 1, 0.9)
    run.save_checkpoint({name: t + 1 for name, t in tensors.items()}, state, 2, 0.1)
    write_images(tmp_path / "images", {f"c{i:02d}": 6 for i in range(20)})
    config = replace(
        preset(recipe=recipe),
        dataset="folder",
        data=ImageFolder(tmp_path / "images", size=28),
        model=Conv4Options(filters=16),
        episodes=ClassificationOptions(ways=3, queries=2, eval_queries=2),
    )
    learner = Experiment.build(config, initial=read_initial(tmp_path)).learner
    drawn = Experiment.build(config).learner
    for name, tensor in learner.state_tensors().items():
        _, _, plain = name.partition("model.")
        if plain.startswith(("head.", "inner_lr.")) or not plain:
            assert torch.equal(tensor, drawn.state_tensors()[name])
        else:  # every step's row of MAML++'s parts starts alike
            assert torch.equal(tensor, source.state_dict()[plain].expand_as(tensor)), name


def test_the_unused_head_of_a_run_of_prototypes_is_no_start(tmp_path):
    config = replace(preset(recipe="proto-maml"), model=Conv4Options(filters=4))
    source = config.model.build((1, 28, 28), 5)
    run = RunFolder.create(tmp_path, to_dict(config))
    run.save_checkpoint({f"model.{n}": t for n, t in source.state_dict().items()}, None, 1, 0.9)
    found = read_initial(tmp_path)
    assert found.keys() == {n for n in source.state_dict() if not n.startswith("head.")}
    arguments = ["--initial", str(tmp_path), "--recipe", "maml"]
    own = run_config(arguments).model.build((1, 28, 28), 5)
    start(own, found)
    assert not own.head.weight.any()
    assert torch.equal(own.blocks[3].conv.weight, source.blocks[3].conv.weight)


def test_what_parts_have_learned_is_of_their_run(tmp_path):
    class Shifted(fewstep.InnerStart):
        def table(self, phi):
            return {"by": torch.ones(3)}

        def __call__(self, phi, support, table):
            return {"head.bias": phi["head.bias"] + table["by"]}

    class Scaled(GradientStep):
        def table(self, adapted, num_steps):
            return {"by": torch.ones(())}

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.by = torch.nn.Parameter(torch.ones(()))

        def forward(self, outputs, y):
            return self.by * F.cross_entropy(outputs, y)

    algorithm = replace(maml(inner_lr=0.1), inner_start=Shifted(), inner_step=Scaled())
    learner = MetaLearner(network(), algorithm, F.cross_entropy, support_loss=Weighted())
    state = learner.state_tensors()
    own = {"model.inner_start.by", "model.inner_step.by", "model.support_loss.by"}
    assert own <= state.keys()
    save_file(state, tmp_path / "state.safetensors")
    start(network(), read_initial(tmp_path / "state.safetensors"))


def test_a_head_of_one_dimension_has_no_projection():
    own = Conv4Options(4, projection=True).build((1, 16, 16), 3)
    start(own, network().state_dict() | {"head.weight": torch.rand(9)})
    assert torch.equal(own.blocks.projection.weight, torch.eye(4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_start(tmp_path, value):
    source = network()
    source.blocks[2].conv.weight.data[0, 0, 0, 0] = value
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"`blocks\.2\.conv\.weight` in .* that is not finite"):
        read_initial(tmp_path / "weights.safetensors")


def _learner(num_steps: int, *, per_step: bool, **options) -> MetaLearner:
    """Return a learner all of whose numbers are others."""
    parts = AlgorithmOptions(
        num_steps=num_steps,
        eval_steps=num_steps,
        per_step_affine=per_step,
        per_step_statistics=per_step,
        **options,
    )
    learner = MetaLearner(network(), parts.build(10), F.cross_entropy)
    with torch.no_grad():
        for tensor in (learner.parameters | learner.buffers).values():
            tensor.copy_(100 * torch.rand(tensor.shape))
    return learner


@pytest.mark.parametrize("options", [
    {"learned_rates": "tensor"}, {"learned_rates": "element"},
    {"learned_rates": "one", "inner_hyper_lr": 0.1}, {"outer": "sgd", "outer_hyper_lr": 0.1},
])  # fmt: skip
@pytest.mark.parametrize("steps", [(3, 3), (3, 2), (2, 3), (3, None), (None, 3)])
def test_rows_of_steps_are_taken_and_learned_rates_are_not(tmp_path, steps, options):
    source, own = (_learner(n or 1, per_step=n is not None, **options) for n in steps)
    run = RunFolder.create(tmp_path, {})
    run.save_checkpoint(source.state_tensors(), None, 1, 0.9)
    rates = {n: t.clone() for n, t in own.parameters.items() if n.startswith("inner_lr.")}
    assert bool(rates) == ("learned_rates" in options)
    start_from(own, read_initial(tmp_path))
    there = source.parameters | source.buffers
    for name, tensor in (own.parameters | own.buffers).items():
        if name in rates:
            assert torch.equal(tensor, rates[name])
            continue
        mine, theirs = (
            t if n is not None and ".norm." in name else t[None]
            for t, n in zip((tensor, there[name]), steps[::-1], strict=True)
        )
        for k, row in enumerate(mine):
            assert torch.equal(row, theirs[min(k, len(theirs) - 1)]), name


def test_what_cannot_be_started_from_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("not tensors")
    RunFolder.create(tmp_path, {})
    for path, message in (
        (tmp_path / "note.txt", "cannot start from .*note.txt: .*; give a run folder or a saf"),
        (tmp_path / "nothing", "cannot start from .*nothing: .*; give a run folder or a safet"),
        (tmp_path / "checkpoints", "checkpoints holds no run"),
        (tmp_path, "has no checkpoint yet; train it first"),
    ):
        with pytest.raises(InputError, match=message):
            read_initial(path)
    for other, message in (
        (
            network(filters=5),
            r"`blocks.0.conv.weight`, \(4, 1, 3, 3\) here, is \(5, 1, 3, 3\) there",
        ),
        (torch.nn.Linear(2, 3), r"`blocks.0.conv.weight`, .* is missing there"),
    ):
        with pytest.raises(InputError, match=message):
            start(network(), other.state_dict())


OMNIGLOT = replace(preset("omniglot"), data=Omniglot(class_split="maml++"))


@pytest.mark.parametrize(("part", "name", "value", "so_that"), [
    ("model", "activation", "leaky-relu", "it is of another network"),
    ("model", "spatial_mean", True, "it is of another network"),
    ("model", "unit_features", True, "it is of another network"),
    ("data", "class_split", "finn", "it may have been trained on what this run tests on"),
])  # fmt: skip
def test_a_run_of_another_network_or_split_is_no_start(tmp_path, part, name, value, so_that):
    """Of the same parameters, which it would take in silence."""
    RunFolder.create(tmp_path, to_dict(OMNIGLOT))
    other = replace(OMNIGLOT, **{part: replace(getattr(OMNIGLOT, part), **{name: value})})
    with pytest.raises(InputError, match=f"{name}=.* where this run has .*, so that {so_that}"):
        check_source(tmp_path, other)


def test_a_run_may_start_from_one_of_another_head_size_and_place(tmp_path):
    RunFolder.create(tmp_path, to_dict(OMNIGLOT))
    model = replace(OMNIGLOT.model, initialisation="zero-head", head="cosine", projection=True)
    data = replace(OMNIGLOT.data, root=tmp_path, size=32)
    check_source(tmp_path, replace(OMNIGLOT, model=model, data=data))


@pytest.mark.parametrize("train", ["train/", ""])
@pytest.mark.parametrize("test", ["test/", ""])
def test_a_class_that_moved_from_train_to_test_was_seen(tmp_path, train, test):
    """Folders may be split or not: the split is no part of what the class is."""
    began = {"train": [f"{train}a", f"{train}b"], "val": ["val/c"], "test": ["test/d"]}
    (tmp_path / "classes.json").write_text(json.dumps(began))
    now = {"train": [f"{train}b"], "val": ["val/c"], "test": [f"{test}d"]}
    check_unseen(tmp_path, now)
    with pytest.raises(InputError, match=r"was trained on 1 of the test classes, such as a; "):
        check_unseen(tmp_path, now | {"test": [f"{test}a", f"{test}d"]})
    with pytest.raises(InputError, match=r"was trained on 1 of the val classes, such as a; "):
        check_unseen(tmp_path, now | {"val": ["val/a", "val/c"]})
