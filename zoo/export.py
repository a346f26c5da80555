"""Models as files that need none of this code: `torch.export` programs (.pt2) and ONNX (.onnx).

A file counts as written only after it has been read back and has given the model's own outputs, at
several batch sizes and, where the size is free, at several sizes.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-4  # largest difference from the model over its largest output
_AXES = {0: "batch", 2: "height", 3: "width"}
_ONNX_BYTES = 2**31  # what one ONNX file can hold
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how well it does.

    Attributes:
        format: "torch" or "onnx".
        bytes: size of the file.
        error: largest difference from the model's outputs over the largest output.
        shapes: of the images that it was checked with.
    """

    format: str
    bytes: int
    error: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Export:
    """A traced model, which `write` puts into files.

    Attributes:
        model: the model itself, in evaluation mode on the CPU.
        program: its trace by `torch.export`.
        axes: names of the axes of the images that are free, by their position.
        ranges: by name of a free axis, its least and greatest length (None: any).
        shapes: of images to check a file with.
        refused: shapes of images, tried because the size is free, that the trace does not hold for,
            and why.
    """

    model: nn.Module
    program: ExportedProgram
    axes: dict[int, str]
    ranges: dict[str, tuple[int, int | None]]
    shapes: tuple[tuple[int, ...], ...]
    refused: dict[tuple[int, ...], str]
    _expected: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)

    def write(self, path: Path, format: str, tolerance: float = TOLERANCE) -> ExportReport:
        """Write a file, read it back, and compare its outputs with the model's.

        Args:
            path: the file; what is there already is replaced.
            format: "torch" (a program for `torch.export.load`) or "onnx" (one file, with weights).
            tolerance: largest difference allowed, over the model's largest output.

        Raises:
            ValueError: `format` is unknown, packages that it needs are missing, the exporter
                refuses the model, or the file's outputs are not the model's; the file is there,
                but not to be trusted.
            OSError: the file cannot be written.
        """
        if format not in SUFFIXES:
            raise ValueError(f"format={format!r} is unknown; allowed are {', '.join(SUFFIXES)}")
        write, read = _WRITERS[format], _READERS[format]
        with _quiet():
            write(self, path)
            run = read(path)
            error = max(self._error(run, shape, format) for shape in self.shapes)
        if not error <= tolerance:  # also where it is no number
            raise ValueError(
                f"the {format} file does not give the outputs of the model: they differ by "
                f"{error:.1e} of the largest; allowed is {tolerance:.0e}"
            )
        return ExportReport(format, path.stat().st_size, error, self.shapes)

    @torch.no_grad()
    def _error(self, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], format: str) -> float:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        if shape not in self._expected:
            self._expected[shape] = self.model(images)
        expected = self._expected[shape]
        try:
            found = run(images)
        except Exception as error:  # of guards and of runtimes, which share no class
            raise ValueError(
                f"the {format} file does not run on images of shape {shape}: {_summary(error)}"
            ) from error
        return ((found - expected).abs().max() / expected.abs().max()).item()


def trace(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    batch_size: int | None = None,
    dynamic_size: bool = False,
    in_chans: int = 3,
) -> Export:
    """Trace a model for `Export.write`.

    Args:
        model: any model of images `(B, in_chans, H, W)` whose output is one tensor, on the CPU.
            It is put into evaluation mode.
        image_size: height and width of the images; where the size is free, of those that it is
            traced with, which decides between sizes that take different paths.
        batch_size: images per batch; None leaves it free.
        dynamic_size: leave height and width free.
        in_chans: channels of the images.

    Raises:
        ValueError: a size is below 1, the model refuses such images, or the exporter refuses the
            model; with `dynamic_size`, most often because it computes with the size.
    """
    if min(image_size) < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"image_size={tuple(image_size)} and batch_size={batch_size} must be at least 1"
        )
    model.eval()
    axes = {a: n for a, n in _AXES.items() if (batch_size is None if a == 0 else dynamic_size)}
    # Exporters take a batch of one for a constant.
    images = torch.zeros(batch_size or 2, in_chans, *image_size)
    with torch.no_grad(), _quiet():
        try:
            model(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"the model refuses images of {image_size[0]} x {image_size[1]} pixels: "
                f"{_summary(error)}"
            ) from error
        try:
            program = torch.export.export(
                model,
                (images,),
                dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),),
                strict=False,
            )
        except Exception as error:  # torch's exporter raises nearly anything
            hint = " (without a dynamic size it may export)" if dynamic_size else ""
            raise ValueError(f"torch.export refuses the model{hint}: {_summary(error)}") from error
        shapes, refused = _probe(program, tuple(images.shape), axes)
    return Export(model, program, axes, _ranges(program, axes), shapes, refused)


def _probe(
    program: ExportedProgram, example: tuple[int, ...], axes: dict[int, str]
) -> tuple[tuple[tuple[int, ...], ...], dict[tuple[int, ...], str]]:
    """Shapes of images that a program serves, and those that it refuses, with the reason.

    Raises:
        ValueError: the size is free by name, but no other size is served.
    """
    batch, channels, height, width = example
    shapes, refused = [example], {}
    if 0 in axes:
        shapes += [(1, *example[1:]), (3, *example[1:])]
    if 2 in axes:
        module = program.module()
        for tall, wide in ((32, 64), (5, 3), (height, 0), (-height // 2, -width // 4)):
            shape = (batch, channels, height + tall, width + wide)
            try:
                module(torch.zeros(shape))
            except (AssertionError, RuntimeError) as error:  # of guards
                refused[shape] = _summary(error)
            else:
                shapes.append(shape)
        if len(refused) == 4:
            raise ValueError(
                f"the size cannot be free: this model's path depends on it, and images of none but "
                f"{height} x {width} pixels take the traced one ({next(iter(refused.values()))}); "
                "a larger image size may take one that more sizes share"
            )
    return tuple(shapes), refused


def _ranges(program: ExportedProgram, axes: dict[int, str]) -> dict[str, tuple[int, int | None]]:
    """The least and the greatest length of every free axis of the images."""
    (name,) = program.graph_signature.user_inputs
    (images,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
    ranges = {}
    for axis, label in axes.items():
        bounds = program.range_constraints[images.shape[axis].node.expr]
        upper = int(bounds.upper) if bounds.upper.is_Integer else None
        # Exporters suppose at least two, and programs take one all the same.
        lower = 1 if axis == 0 else int(bounds.lower)
        ranges[label] = (lower, upper)
    return ranges


def _write_torch(export: Export, path: Path) -> None:
    torch.export.save(export.program, str(path))


def _read_torch(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(str(path)).module()


def _write_onnx(export: Export, path: Path) -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format='onnx' needs {', '.join(missing)}: pip install 'vitarium[export]', or "
            f"pip install {' '.join(_ONNX_PACKAGES)}"
        )
    size = sum(t.numel() * t.element_size() for t in export.model.state_dict().values())
    if size >= _ONNX_BYTES:
        raise ValueError(
            f"format='onnx': the weights take {size / 2**30:.1f} GiB; one ONNX file holds 2 GiB"
        )
    try:
        onnx_program: Any = torch.onnx.export(
            export.program,
            (),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(export.axes,),
            verbose=False,
        )
    except Exception as error:  # torch's exporter raises nearly anything
        raise ValueError(f"torch.onnx.export refuses the model: {_summary(error)}") from error
    onnx_program.save(str(path), external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}
_READERS = {"torch": _read_torch, "onnx": _read_onnx}


def _summary(error: BaseException) -> str:
    """The cause of an exporter's error on one line: its own words, without the advice."""
    while error.__cause__ is not None and "onnx" in type(error.__cause__).__module__ + str(error):
        error = error.__cause__
    text = re.split(r"If you're using|Suggested fixes|The error above", str(error))[0]
    text = text.replace('For more information, run with TORCH_LOGS="+dynamic".', "")
    return " ".join(text.split())[:400] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say on the way, none of which is of use to the caller."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
