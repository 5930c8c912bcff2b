"""Parameters to start from: those of a trained run, or of a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fewstep.core.errors import InputError
from fewstep.core.judge import SUPPORT_LOSS
from fewstep.core.learner import MetaLearner
from fewstep.core.meta_parameters import RATE, START, STEP
from fewstep.core.modules import last_layer
from fewstep.core.norm import NormStatistics, PerStepAffine
from fewstep.core.tensors import Tensors, below
from fewstep.models.conv import PROJECTION
from fewstep.models.features import projection_of
from fewstep.training.classes_file import Classes, read_classes
from fewstep.training.config import RunConfig, SinusoidData, to_dict
from fewstep.training.same_settings import open_run

_MODEL = "model."  # before the names of a module's tensors in a checkpoint
# What a learner has beside its module, of which a new run has its own.
_BESIDE = (RATE, START, STEP, SUPPORT_LOSS, "inner_lr_hypergradient.")


def initial_of(config: RunConfig) -> Tensors | None:
    """Return what the settings of a run say to start from; None if they say nothing.

    Raises:
        InputError: what `read_initial` and `check_source` raise.
    """
    if config.initial is None:
        return None
    tensors = read_initial(config.initial)
    check_source(config.initial, config)
    return tensors


def read_initial(path: Path) -> Tensors:
    """Return the parameters and buffers of a run's best checkpoint, or of a safetensors file.

    What a run keeps for each step has a row for each.

    Args:
        path: Folder of a run, or a file with tensors by the names of the module's own, as
            `safetensors.torch.save_file(module.state_dict(), path)` writes it.

    Raises:
        InputError: there is neither, the run has no checkpoint, or a number is not finite.
    """
    if path.is_dir():
        run, config = open_run(path)
        tensors = run.load_checkpoint(run.kept("best")[0].name)
        if config.algorithm.start == "prototypes":  # whose last layer nobody has learned
            assert not isinstance(config.data, SinusoidData)
            with torch.device("meta"):
                module = config.model.build(config.data.image_shape, 1)
            unlearned = f"{_MODEL}{last_layer(name for name, _ in module.named_parameters())}."
            tensors = {n: t for n, t in tensors.items() if not n.startswith(unlearned)}
    else:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot start from {path}: {error}; give a run folder or a safetensors file"
            ) from error
    if any(name.startswith(_MODEL) for name in tensors):
        own = below(tensors, _MODEL)
        tensors = {name: t for name, t in own.items() if not name.startswith(_BESIDE)}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"`{name}` in {path} has a number that is not finite; start from another"
            )
    return tensors


def check_source(path: Path, config: RunConfig) -> None:
    """Check that a run may start from the run in `path`; a file says nothing of where it is from.

    Raises:
        InputError: that has another network; or its data are split otherwise, so that it may have
            been trained on what this run tests on.
    """
    if not path.is_dir():
        return
    _, source = open_run(path)
    parts = [("model", {"initialisation", "head", "projection"}, "is of another network")]
    if source.dataset == config.dataset:
        parts += [("data", {"root", "size"}, "may have been trained on what this run tests on")]
    for part, free, so_that in parts:
        theirs, ours = (
            {"network": each.network} | to_dict(getattr(each, part)) for each in (source, config)
        )
        for name in theirs | ours:
            if name not in free and theirs.get(name) != ours.get(name):
                raise InputError(
                    f"{path} has {name}={theirs.get(name)!r} where this run has "
                    f"{ours.get(name)!r}, so that it {so_that}; give both the same"
                )


def check_unseen(path: Path, classes: Classes) -> None:
    """Check that the run in `path`, of the same data, was trained on no class to be tested on.

    Runs of versions that did not note their classes, and of other data, are taken as they are.

    Raises:
        InputError: it was.
    """
    if not path.is_dir():
        return
    trained = _without_split(read_classes(path), "train")
    if not trained & _without_split(classes, "train"):
        return  # of other data, where a name may be another class
    for split in ("val", "test"):
        if seen := sorted(trained & _without_split(classes, split)):
            raise InputError(
                f"{path} was trained on {len(seen)} of the {split} classes, such as {seen[0]}; the "
                "data have changed since, so train it anew"
            )


def _without_split(classes: Classes, split: str) -> set[str]:
    """Return the names of a split's classes; a folder that is split has the split before each."""
    return {name.removeprefix(f"{split}/") for name in classes.get(split, ())}


def fitting(module: nn.Module, initial: Tensors) -> Tensors:
    """Return what `initial` gives the module's parameters and buffers, by their names.

    These are all, or all but those of the last layer, whose outputs are another task's classes, and
    of a projection, which a classifier's head gives if it can. Those of normalisation layers may
    have rows.

    Raises:
        InputError: another one is missing or of another shape, or there are more.
    """
    own = module.state_dict()
    free = [last_layer(name for name, _ in module.named_parameters()) + "."]
    if PROJECTION in own:
        free.append(PROJECTION)
        initial = _with_projection(initial)
    with_rows = {*PerStepAffine().rows(module, 1), *NormStatistics(per_step=True).rows(module, 1)}

    def fits(name: str, shape: torch.Size) -> bool:
        there = initial[name].shape
        return there == shape or (name in with_rows and there[1:] == shape and 0 not in there)

    found = {n: initial[n] for n, t in own.items() if n in initial and fits(n, t.shape)}
    for name, tensor in own.items():
        if name not in found and not name.startswith(tuple(free)):
            there = f"{tuple(initial[name].shape)} there" if name in initial else "missing there"
            raise InputError(
                f"initial parameters are of another network: `{name}`, {tuple(tensor.shape)} here, "
                f"is {there}; give the same network, filters and normalisation"
            )
    for name in initial:
        if name not in own and not name.startswith(tuple(free)):
            raise InputError(
                f"initial parameters are of another network: `{name}`, "
                f"{tuple(initial[name].shape)} there, is missing here; give the same network"
            )
    for layer in free:
        if any(name.startswith(layer) and name not in found for name in own):  # a bias is no head
            found = {name: t for name, t in found.items() if not name.startswith(layer)}
    return found


def _with_projection(initial: Tensors) -> Tensors:
    """Return `initial` and, if it has none, the projection of its classifier's head.

    A head of fewer classes than features says too little of these, and one that is no matrix
    nothing: the projection then stays the identity.
    """
    head = initial.get("head.weight")
    if PROJECTION in initial or head is None or head.ndim != 2 or len(head) < head.shape[1]:
        return initial
    if "head.scale" in initial:  # a `CosineHead`'s, whose lengths say nothing
        head = F.normalize(head)
    return {**initial, PROJECTION: projection_of(head)}


def start_from(learner: MetaLearner, initial: Tensors) -> None:
    """Bring `initial` into a learner; a last layer of other outputs stays as it is.

    Row k of what differs by step becomes row k there, or the last one there is, as in a test of
    more steps. What has no rows here becomes row 0, that of the module before it adapts.

    Raises:
        InputError: it is another network's.
    """
    plain = learner.module.state_dict()
    own = plain | learner.parameters | learner.buffers
    with torch.no_grad():
        for name, tensor in fitting(learner.module, initial).items():
            rows, there = (t if t.ndim > plain[name].ndim else t[None] for t in (own[name], tensor))
            rows.copy_(there[torch.arange(len(rows)).clamp(max=len(there) - 1)])
