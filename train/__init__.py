"""Training, evaluation and prediction: the loop, its configuration, its checkpoints."""

from vitarium.train.checkpoint import load_model
from vitarium.train.config import ConfigError, TrainConfig
from vitarium.train.evaluate import Evaluation, evaluate
from vitarium.train.interrupt import Interrupted
from vitarium.train.loop import RunResult, resume, train
from vitarium.train.predict import Prediction, predict

__all__ = [
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "Prediction",
    "RunResult",
    "TrainConfig",
    "evaluate",
    "load_model",
    "predict",
    "resume",
    "train",
]
