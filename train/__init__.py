"""Training, evaluation and prediction: the loop, its configuration, its checkpoints."""

from vitarium.train.checkpoint import load_model
from vitarium.train.config import ConfigError, TrainConfig
from vitarium.train.interrupt import Interrupted
from vitarium.train.loop import RunResult, resume, train
from vitarium.train.metrics import Evaluation
from vitarium.train.predict import Prediction, predict
from vitarium.train.suite import evaluate, evaluate_suite
from vitarium.train.weights import load_weights

__all__ = [
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "Prediction",
    "RunResult",
    "TrainConfig",
    "evaluate",
    "evaluate_suite",
    "load_model",
    "load_weights",
    "predict",
    "resume",
    "train",
]
