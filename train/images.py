"""Images as they are stored, and what is done about those that cannot be read."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.readers import get_img_extensions
from torchvision.datasets.folder import IMG_EXTENSIONS

_LOG = logging.getLogger("vitarium.train")
_LISTED = 5  # names in an error message


class StoredImage(NamedTuple):
    """An image inside of something larger: an archive, a table.

    Args:
        name: what messages call it.
        read: its encoded bytes, or the decoded image where the storage decodes by itself.
    """

    name: str
    read: Callable[[], bytes | Image.Image]


AnyImage = Path | StoredImage | Image.Image


def image_suffixes() -> set[str]:
    """Endings of image files, in lower case: torchvision's, timm's (which can be extended), GIF."""
    return {*IMG_EXTENSIONS, *get_img_extensions(), ".gif"}


def image_name(image: AnyImage, index: int) -> str:
    """What messages call the image; one in memory goes by its index."""
    if isinstance(image, Image.Image):
        return f"image {index}"
    return str(image) if isinstance(image, Path) else image.name


class Decoded(NamedTuple):
    """An image and how it was stored.

    Args:
        image: the pixels, in RGB.
        mode: Pillow's name for the kind of pixels that were stored, such as "CMYK".
        size: of the encoded image in bytes; 0 for an image in memory.
    """

    image: Image.Image
    mode: str
    size: int


def read_image(image: AnyImage) -> Image.Image:
    """The image in RGB, as timm's `ImageDataset` has it: the first frame, unturned by EXIF.

    Transparency is dropped. 16 bits per channel are brought to 8, which Pillow's own conversion
    would clip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no image that can be read.
    """
    return decode_image(image).image


def decode_image(image: AnyImage) -> Decoded:
    """`read_image`, and how the image was stored."""
    if isinstance(image, Image.Image):
        return Decoded(image if image.mode == "RGB" else _to_rgb(image), image.mode, 0)
    name = image_name(image, 0)
    try:
        stored = image.read_bytes() if isinstance(image, Path) else image.read()
        if isinstance(stored, Image.Image):
            return Decoded(_to_rgb(stored), stored.mode, 0)
        with Image.open(io.BytesIO(stored)) as opened:
            return Decoded(_to_rgb(opened), opened.mode, len(stored))
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"image {name} cannot be read: {_without_address(reason)}") from None


def _without_address(reason: str) -> str:
    """Pillow's message without the address of our buffer, which differs from run to run."""
    return "cannot identify image file" if reason.startswith("cannot identify image") else reason


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    return image.convert("RGB")  # a copy, which outlives the file


class BrokenDataError(ValueError):
    """More images than allowed cannot be read; the message names some."""


class Broken(NamedTuple):
    """An image that could not be read: its name and the reason."""

    name: str
    reason: str


class BrokenImages:
    """Which images could not be read so far, and how many may be.

    Every distinct image is logged once, as it is found, and written to a file once one is given.

    Args:
        total: number of images of the data.
        allowed: as `SourceConfig.max_broken`; nothing may be broken by default.
    """

    def __init__(self, total: int = 0, allowed: float = 0) -> None:
        self.total = total
        self.limit = int(allowed) if allowed >= 1 or allowed == 0 else max(1, int(allowed * total))
        self.found: dict[str, str] = {}  # name to reason
        self._file: Path | None = None

    def __len__(self) -> int:
        return len(self.found)

    def record_in(self, path: Path, *, write: bool) -> None:
        """Take over what `path` lists, of the run until now; if `write`, append what is new."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self.found.setdefault(record["image"], record["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # half a line, from a process that was killed: it is found again
        if write and text and not text.endswith("\n"):
            self._append("\n", path)
        self._file = path if write else None

    def add(self, broken: Iterable[Broken]) -> None:
        """Note images that could not be read.

        Raises:
            BrokenDataError: they are more than allowed by now.
        """
        new = {name: reason for name, reason in broken if name not in self.found}
        if not new:
            return
        self.found |= new
        for reason in new.values():
            _LOG.warning("%s (%d broken so far, %d allowed)", reason, len(self), self.limit)
        if self._file is not None:
            lines = [json.dumps({"image": name, "reason": new[name]}) for name in new]
            self._append("".join(f"{line}\n" for line in lines), self._file)
        if len(self) > self.limit:
            raise BrokenDataError(self._message())

    @staticmethod
    def _append(text: str, path: Path) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)

    def _message(self) -> str:
        reasons = list(self.found.values())
        more = len(reasons) - _LISTED
        listed = "; ".join(reasons[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        of = f" of {self.total}" if self.total else ""
        allowed = f"source.max_broken allows {self.limit}"
        return f"{len(self)} images{of} cannot be read, {allowed}: {listed}"

    def share(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Bring the findings of all processes together.

        Args:
            gather: from a process's list to the lists of all in one.

        Raises:
            BrokenDataError: together they are more than allowed.
        """
        self.add([Broken(*entry) for entry in gather(list(self.found.items()))])
