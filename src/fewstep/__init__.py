"""Gradient-based meta-learning: models that learn a new task in a few gradient steps."""

import fewstep.core.stand_ins
import fewstep.models.layers  # noqa: F401  (registers stand-ins, too)
from fewstep.core.adapted import AdaptedParameters
from fewstep.core.algorithm import Algorithm
from fewstep.core.clipping import ClipByNorm, ClipByValue, NoClipping
from fewstep.core.derivative_order import DerivativeAnnealing, FixedOrder
from fewstep.core.errors import InputError
from fewstep.core.hypergradient import (
    Guards,
    HypergradientAdam,
    HypergradientRates,
    HypergradientSGD,
)
from fewstep.core.inner_start import InnerStart, PrototypeStart, SharedStart, SupportSets
from fewstep.core.inner_step import AdamStep, GradientStep, InnerStep, MomentumStep
from fewstep.core.learner import MetaLearner
from fewstep.core.metrics import Metrics
from fewstep.core.norm import NormStatistics, PerStepAffine, SharedAffine
from fewstep.core.outer import SGD, Adam, ConstantSchedule, CosineAnnealing
from fewstep.core.query_weights import FinalStep, MultiStepLoss
from fewstep.core.ranks import Ranks
from fewstep.core.rates import ConstantRate, ElementRates, LayerStepRates, LearnedRate, StepRates
from fewstep.core.recipes import (
    alpha_maml,
    anil,
    auto,
    cavia,
    fomaml,
    maml,
    maml_plus_plus,
    meta_sgd,
    proto_maml,
    prototypical_networks,
)
from fewstep.core.scores import Difference, Scores, paired_difference
from fewstep.core.tasks import Episodes, TaskBatch

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamStep",
    "AdaptedParameters",
    "Algorithm",
    "ClipByNorm",
    "ClipByValue",
    "ConstantRate",
    "ConstantSchedule",
    "CosineAnnealing",
    "DerivativeAnnealing",
    "Difference",
    "ElementRates",
    "Episodes",
    "FinalStep",
    "FixedOrder",
    "GradientStep",
    "Guards",
    "HypergradientAdam",
    "HypergradientRates",
    "HypergradientSGD",
    "InnerStart",
    "InnerStep",
    "InputError",
    "LayerStepRates",
    "LearnedRate",
    "MetaLearner",
    "Metrics",
    "MomentumStep",
    "MultiStepLoss",
    "NoClipping",
    "NormStatistics",
    "PerStepAffine",
    "PrototypeStart",
    "Ranks",
    "Scores",
    "SharedAffine",
    "SharedStart",
    "StepRates",
    "SupportSets",
    "TaskBatch",
    "alpha_maml",
    "anil",
    "auto",
    "cavia",
    "fomaml",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "paired_difference",
    "proto_maml",
    "prototypical_networks",
]
