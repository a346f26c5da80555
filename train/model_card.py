"""The model card of a run: what it is, how it was made and how to load it, as the hub reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vitarium.train.checkpoint import write_text
from vitarium.train.run_page import RunFacts, best_record, read_template

CARD = "README.md"
_CLASSIFIES = ("classification", "distillation")  # tasks whose figures are of the classes
MARK = "<!-- Written by vitarium, and again when the run goes on, as long as this line is here. -->"
_LOG = logging.getLogger("vitarium.train")


def write_model_card(facts: RunFacts, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `README.md` into the run's folder: front matter of the Hugging Face hub, and text.

    A file that somebody else wrote, or took over by removing the line that says so, stays.

    Args:
        facts: what the run is.
        history: a record per epoch, at least one.
    """
    path = facts.folder / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        _LOG.info("%s is not ours: it stays as it is", path)
        return
    write_text(path, str(model_card(facts, history)))


def model_card(facts: RunFacts, history: Sequence[Mapping[str, Any]]) -> ModelCard:
    """The card of a run, of which `history` has a record per epoch."""
    config, best, last = facts.config, best_record(history), history[-1]
    data = _data_name(config.data)
    cfg = timm.get_pretrained_cfg(config.model) if config.pretrained else None
    stated = getattr(cfg, "license", None)
    classifies = config.task in _CLASSIFIES
    license = None if stated in (None, "", "none stated") else stated
    card_data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=["image-classification" if classifies else config.task, "timm", "vitarium"],
        datasets=[data],
        metrics=["accuracy"] if classifies else None,
        base_model=getattr(cfg, "hf_hub_id", None) or None,
        model_name=facts.folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type=data,
                dataset_name=data,
                dataset_split="held out",
                metric_type=kind,
                metric_name=name,
                metric_value=round(best[key], 6),
            )
            for key, kind, name in (
                ("accuracy", "accuracy", "top-1 accuracy"),
                ("accuracy_top5", "accuracy", "top-5 accuracy"),
                ("loss", "loss", "cross-entropy in nats"),
            )
            if classifies and best.get(key) is not None
        ],
    )
    # Not ModelCard.from_template: its Jinja keeps the lines of statements, which breaks tables.
    content = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        read_template("model_card.md")
    )
    text = content.render(
        card_data=card_data.to_yaml(),
        mark=MARK,
        name=facts.folder.resolve().name,
        model=config.model,
        task=config.task,
        classifies=classifies,
        model_kwargs="".join(f", {k}={v!r}" for k, v in config.model_kwargs.items()),
        num_classes=len(facts.data.classes),
        pretrained=config.pretrained,
        license=license,
        origin=getattr(cfg, "origin_url", None),
        best=best,
        last=last,
        averaged=config.ema_decay is not None,
        sizes=facts.sizes(),
        inputs=facts.inputs,
        environment=facts.environment(),
        config=config.to_yaml(),
    )
    return ModelCard(text)


def _data_name(source: str) -> str:
    """A data set's name without where it lies: that concerns nobody but this machine."""
    scheme, _, place = source.partition(":")
    name = place.partition("@")[0].rstrip("/").rpartition("/")[2]
    return (name or scheme).lower()
