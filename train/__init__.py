"""Training, evaluation and prediction: the loop, its configuration, its checkpoints."""

from vitarium.train.checkpoint import load_model
from vitarium.train.config import ConfigError, TrainConfig
from vitarium.train.evaluate import Evaluation, evaluate
from vitarium.train.interrupt import Interrupted
from vitarium.train.loop import RunResult, resume, train

__all__ = [
    "ConfigError",
    "Evaluation",
    "Interrupted",
    "RunResult",
    "TrainConfig",
    "evaluate",
    "load_model",
    "resume",
    "train",
]
