"""Pictures of a benchmark, opened when asked for: files, base64 cells of a table, parquet rows.

All come out in RGB, as lmms-eval hands them to models. Each is equal to another of the same name,
so a picture that several questions share is recognized.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import PictureSource
from quota_jax.processing.hugging_face import first_line, without_warnings
from quota_jax.processing.images import default_pixel_limit, open_picture


def inside(root: Path, path: Path, where: str) -> Path:
    """``path``, once it is certain that it does not leave the folder ``root``, by links or dots.

    Raises:
        QuotaError: it does, or it cannot be looked up; ``where`` begins the message.
    """
    try:
        within = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, NUL characters
        raise QuotaError(f"{where}: {str(path)!r}: {first_line(error)}") from None
    if not within:
        raise QuotaError(f"{where}: {str(path)!r} leads out of the folder {root}")
    return path


def find_picture(
    root: Path,
    folders: Sequence[Path],
    name: str,
    where: str,
    *,
    suffixes: Sequence[str] = ("",),
) -> FilePicture:
    """The picture called ``name`` plus one of ``suffixes`` in the first of ``folders`` that has it.

    Args:
        root: the data folder, which links must not leave.
        where: the file and row that name the picture, for errors.

    Raises:
        QuotaError: no such picture, or a name that leads out of its folder.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise QuotaError(f"{where}: {name!r} is no name of a picture inside the folder")
    for folder in folders:
        for suffix in suffixes:
            path = inside(root, folder / f"{name}{suffix}", where)
            if path.is_file():
                return FilePicture(path=path)
    places = " or ".join(str(folder / f"{name}{suffixes[0]}") for folder in folders)
    others = f" (nor {', '.join(suffixes[1:])})" if len(suffixes) > 1 else ""
    raise QuotaError(f"{where}: no picture {places}{others}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePicture:
    """A picture file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        limit = default_pixel_limit()
        return _rgb(open_picture(self.path, name=self.name, max_image_pixels=limit), self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class CellPicture:
    """A picture in base64 inside a table, of which only the place in the file is held.

    line: where its row begins. start, length: the bytes of the base64 text.
    """

    path: Path
    line: int
    start: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.path}: line {self.line}"

    def load(self) -> Image.Image:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                text = file.read(self.length).decode("ascii")
        except OSError as error:
            raise QuotaError(f"{self.path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise QuotaError(f"{self.path}: has changed since it was read") from None
        return open_bytes(decode_base64(text, self.name), self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPicture:
    """A picture of a parquet row.

    table: a `datasets.Dataset` in arrow format with the pictures' column alone, mapped into memory.
    row: its row there; name: file and row.
    """

    name: str
    table: Any = field(compare=False, repr=False)
    row: int = field(compare=False)

    def load(self) -> Image.Image:
        value = self.table[self.row].column(0)[0].as_py()
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise QuotaError(f"{self.name}: holds no picture")
        return open_bytes(data, self.name)


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of a base64 text, which may be broken into lines."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise QuotaError(f"{where}: the picture is not whole base64: {first_line(error)}") from None
    if not data:
        raise QuotaError(f"{where}: holds no picture")
    return data


def open_bytes(data: bytes, name: str) -> Image.Image:
    """The decoded RGB picture of an encoded file's bytes."""
    try:
        with without_warnings():
            picture = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise QuotaError(f"{name}: not a picture in a known format") from None
    except Exception as error:  # whatever a decoder raises on a damaged header
        raise QuotaError(f"{name}: not readable as a picture: {first_line(error)}") from None
    return _rgb(open_picture(picture, name=name, max_image_pixels=default_pixel_limit()), name)


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    try:
        # Pillow warns about palettes with transparency, which the conversion handles.
        with without_warnings():
            return picture.convert("RGB")
    except Exception as error:  # modes that Pillow cannot convert
        raise QuotaError(f"{name}: cannot be converted to RGB: {first_line(error)}") from None


@dataclass(frozen=True, slots=True)
class GrayPicture:
    """A picture of the size of another one in the mean color of CLIP's normalisation, so that a
    model gets zeros: what is answered to it is answered blind."""

    of: PictureSource

    @property
    def name(self) -> str:
        return f"{self.of.name} (gray)"

    def load(self) -> Image.Image:
        return Image.new("RGB", self.of.load().size, (123, 117, 104))
