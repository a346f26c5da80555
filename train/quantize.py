"""Int8 models through torchao, as programs of `torch.export`.

"dynamic" quantises the weights of linear layers per output channel, and what they take in per token
while they run (`torchao.quantization.quantize_`); their products are then of integers on any CPU.
"static" also quantises convolutions, and activations by ranges that calibration images show, in the
traced program (torchao's PT2E flow with its x86 quantizer); that computes with integers after
`torch.compile` of the program, and simulates them before.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.zoo.export import Export, trace

MODES = ("dynamic", "static")


def quantize_model(
    model: nn.Module,
    mode: str,
    image_size: tuple[int, int],
    calibration: Iterable[Tensor] = (),
) -> Export:
    """An int8 copy of a model, traced for any batch size.

    Args:
        model: on the CPU; it is left as it is, in evaluation mode.
        mode: "dynamic" or "static".
        image_size: height and width of the images in pixels.
        calibration: batches of normalised images `(B, 3, H, W)` for "static".

    Returns:
        The traced copy: `Export.write` puts it into a file, `Export.program.module()` runs.

    Raises:
        ValueError: `mode` is unknown, torchao is not installed or does not support the model, or
            there are no images to calibrate with.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; allowed are {', '.join(MODES)}")
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise ValueError("quantisation needs torchao: pip install 'vitarium[compress]'") from None
    plain = _plain(model.eval())
    if not any(type(part) is nn.Linear for part in plain.modules()):
        raise ValueError("torchao's int8 needs linear layers; this model has none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if mode == "dynamic":
                return trace(_dynamic(plain), image_size)
            return trace(_static(plain, image_size, list(calibration)), image_size)
        except _NoImages:
            raise ValueError(
                "mode='static' needs images to calibrate with; there are none"
            ) from None
        except Exception as error:  # torchao and its tracer raise nearly anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"torchao does not support this model in mode {mode!r}: {reason}"
            ) from error


class _NoImages(Exception):
    pass


def _plain(model: nn.Module) -> nn.Module:
    """A copy whose linear layers are PyTorch's own, which is how torchao knows them."""
    plain = copy.deepcopy(model)
    for part in plain.modules():
        if isinstance(part, nn.Linear):
            part.__class__ = nn.Linear
    return plain


def _dynamic(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _static(model: nn.Module, image_size: tuple[int, int], batches: list[Tensor]) -> nn.Module:
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    if not batches:
        raise _NoImages
    traced: Any = trace(model, image_size).program.module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(traced, quantizer)
    with torch.no_grad():
        for images in batches:
            prepared(images)
    converted = convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(converted)
    pt2e.allow_exported_model_train_eval(converted)  # `trace` calls eval()
    used = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    tensors = [*converted.named_parameters(), *converted.named_buffers()]
    for name, _ in tensors:  # the weights that int8 ones have replaced
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(converted.get_submodule(owner), attribute)
    return converted


class Program(nn.Module):
    """A program that `Export.write` wrote, as a module that may be told to be in evaluation mode.

    Args:
        path: the .pt2 file.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        import torchao  # noqa: F401  knows the tensors in the file

        try:
            program: Any = torch.export.load(str(path)).module()
        except Exception as error:  # zip, pickle and torch each have errors of their own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"program {path} cannot be read: {reason}") from None
        vars(self)["program"] = program  # no child: traced modules refuse `eval()`

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalised images `(B, 3, H, W)`."""
        return vars(self)["program"](images)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; those of tensors made of several, of all."""
    total = 0
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        parts = [tensor]
        while any(hasattr(part, "__tensor_flatten__") for part in parts):
            parts = [
                inner
                for part in parts
                for inner in (
                    [getattr(part, name) for name in part.__tensor_flatten__()[0]]
                    if hasattr(part, "__tensor_flatten__")
                    else [part]
                )
            ]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
