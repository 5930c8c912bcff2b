"""Gradient-based meta-learning: models that learn a new task in a few gradient steps."""

from fewstep.core.algorithm import Algorithm, fomaml, maml
from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.core.metrics import Metrics
from fewstep.core.parts import (
    SGD,
    Adam,
    AdaptedParameters,
    Constant,
    ConstantRate,
    CosineAnnealing,
    FinalStep,
)
from fewstep.core.scores import Scores
from fewstep.core.tasks import Episodes, TaskBatch

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdaptedParameters",
    "Algorithm",
    "Constant",
    "ConstantRate",
    "CosineAnnealing",
    "Episodes",
    "FinalStep",
    "InputError",
    "MetaLearner",
    "Metrics",
    "Scores",
    "TaskBatch",
    "fomaml",
    "maml",
]
