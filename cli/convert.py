"""`vitarium convert`: an official checkpoint as a safetensors file in our names."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from safetensors.torch import save_file

from vitarium.train.checkpoint import contiguous_state_dict, write_atomic
from vitarium.zoo import from_checkpoint


def parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write the weights of an official checkpoint in our names, as safetensors. "
        "timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=OUTPUT)) "
        "loads them; so it does the official file itself."
    )
    parser.add_argument(
        "source", metavar="OFFICIAL", type=str, help="a checkpoint file or its address"
    )
    parser.add_argument("--model", type=str, required=True, help="the registered name it is of")
    parser.add_argument(
        "--output", type=str | None, help="MODEL.safetensors in this folder, if not given"
    )
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="whether OUTPUT may exist already"
    )
    return parser


def run(config: Namespace) -> None:
    output = Path(config.output or f"{config.model}.safetensors")
    if output.suffix != ".safetensors":
        raise ValueError(f"output={str(output)!r} must end in .safetensors")
    if not output.parent.is_dir():
        raise ValueError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}")
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output} exists; --overwrite true replaces it")
    model, report, metadata = from_checkpoint(config.source, config.model)
    tensors = contiguous_state_dict(model)
    write_atomic(output, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    console = Console()
    console.print(f"{report}", highlight=False, soft_wrap=True)
    console.print(
        f"written {output}: {config.model}, {metadata['num_classes']} classes, "
        f"licence {metadata['license']}",
        highlight=False,
        soft_wrap=True,
    )
