"""Writes the benchmarks into a folder: resumable, checked against frozen hashes, never half a file.

A family grows in a folder of its own beside its target and is renamed when complete; then the
manifest records it. Pictures already drawn survive a kill.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from quota_jax.errors import QuotaError
from quota_jax.testbed.benchmarks.family import SPLITS, Bundle, is_unseen
from quota_jax.testbed.world.layout import HELD_OUT, Layout, sample_layout
from quota_jax.testbed.world.renderer import render_nhwc

FAMILIES: tuple[str, ...] = (
    "pope", "gqa", "mme", "mmbench", "seedbench", "scienceqa", "textvqa",
)  # fmt: skip
STYLES: tuple[str, ...] = ("mixed", "training", "held-out")
VERSION = 2
"""Of the generator: raised when questions change, together with the frozen hashes."""
MANIFEST = "manifest.json"
_CHUNK = 8


def build_family(name: str, split: str, limit: int | None = None) -> Bundle:
    """Questions of one family, without drawing anything."""
    return importlib.import_module(f"quota_jax.testbed.benchmarks.{name}").build(split, limit)


def frozen_hashes() -> dict[str, Any]:
    """The committed sha256 of every family's question files: split -> family -> digest."""
    return json.loads((Path(__file__).parent / "frozen.json").read_text())


def question_digest(bundle: Bundle) -> str:
    """One sha256 over the paths and hashes of a family's question files, and over which pictures
    are drawn in the held-out style."""
    fixed = [bundle.question_hashes(), bundle.unseen()]
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()


def freeze() -> bytes:
    """Content of `frozen.json` for the generator as it is now."""
    table = {
        split: {name: question_digest(build_family(name, split)) for name in FAMILIES}
        for split in SPLITS
    }
    return (json.dumps({"version": VERSION, **table}, indent=2) + "\n").encode()


def write_benchmarks(
    out: Path,
    *,
    split: str,
    limit: int | None = None,
    families: Sequence[str] = FAMILIES,
    style: str = "mixed",
    progress: bool = True,
) -> dict[str, Any]:
    """Write `families` of a split into `out` and return the manifest.

    The same call again completes or checks what is there; families can be added. A folder that
    holds another split, limit, style or version, or other files, is refused. `limit` keeps the
    first questions of each family (of each file or category, where it has several). `style`
    "mixed" draws three pictures of ten in the style that training never sees, "training" none and
    "held-out" all of them; the scenes and questions stay the same.

    Raises:
        QuotaError: bad arguments; another set in `out`; damaged files; questions that differ from
            the frozen ones.
    """
    _check_arguments(split, limit, families, style)
    settings = {"version": VERSION, "split": split, "seed": SPLITS[split]}
    settings |= {"limit": limit, "style": style}
    manifest = _open(out, settings)
    for name in FAMILIES:
        if name not in families:
            continue
        bundle = build_family(name, split, limit)
        frozen = frozen_hashes()[split][name]
        if limit is None and question_digest(bundle) != frozen:
            raise QuotaError(
                f"the questions of {name} ({split}) differ from the frozen ones "
                f"({question_digest(bundle)[:12]} instead of {frozen[:12]})"
            )
        if name in manifest["families"]:
            _check_family(out / name, name, bundle, manifest["families"][name], progress)
            continue
        record = _write_family(out / name, name, bundle, style, progress)
        manifest["families"][name] = record
        _write(out / MANIFEST, _manifest_bytes(manifest))
    return manifest


def _check_arguments(split: str, limit: int | None, families: Sequence[str], style: str) -> None:
    if split not in SPLITS:
        raise QuotaError(f"no split {split!r}; known: {', '.join(SPLITS)}")
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise QuotaError(f"limit must be at least 1, got {limit}")
    if style not in STYLES:
        raise QuotaError(f"no style {style!r}; known: {', '.join(STYLES)}")
    if not families:
        raise QuotaError("no family to write")
    for name in families:
        if name not in FAMILIES:
            raise QuotaError(f"no family {name!r}; known: {', '.join(FAMILIES)}")


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _open(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of `out`, new or of the same settings."""
    path = out / MANIFEST
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            known = {key: manifest[key] for key in settings}
            present = manifest["families"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise QuotaError(f"{path} is not a manifest of benchmarks") from None
        for key, value in settings.items():
            if known[key] != value:
                raise QuotaError(f"{out} holds another set: {key} is {known[key]!r}, not {value!r}")
        return {**settings, "families": dict(present)}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuotaError(f"{out} exists and holds no benchmarks; give an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    manifest = {**settings, "families": {}}
    _write(path, _manifest_bytes(manifest))
    return manifest


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _pixel_hash(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        raise QuotaError(f"{name}: not a readable picture") from None


def _draw(bundle: Bundle, scenes: list[int], style: str) -> Iterator[tuple[int, np.ndarray]]:
    """(scene, picture) of the given scenes, in chunks of one shape."""
    every = {"training": -1, "held-out": HELD_OUT}.get(style)
    for start in range(0, len(scenes), _CHUNK):
        part = scenes[start : start + _CHUNK]
        filled = part + [part[0]] * (_CHUNK - len(part))
        unseen = np.array([HELD_OUT if is_unseen(scene) else -1 for scene in filled])
        styles = unseen if every is None else every
        layout = sample_layout(bundle.uniforms[filled], bundle.difficulty, style=styles)
        images = np.asarray(render_nhwc(Layout(*map(np.asarray, layout))))
        yield from zip(part, images, strict=False)


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _write_family(
    target: Path, name: str, bundle: Bundle, style: str, progress: bool
) -> dict[str, Any]:
    if target.exists():
        raise QuotaError(f"{target} is in the way: the manifest does not know it")
    partial = target.with_name(f".{name}.partial")
    by_scene: dict[int, list[str]] = {}
    for path, scene in bundle.pictures.items():
        by_scene.setdefault(scene, []).append(path)
    missing = [
        scene
        for scene, paths in sorted(by_scene.items())
        if not all((partial / path).is_file() for path in paths)
    ]

    def save(scene: int, image: np.ndarray) -> None:
        data = _png(image)
        for path in by_scene[scene]:
            _write(partial / path, data)

    bar = tqdm(
        total=len(by_scene), initial=len(by_scene) - len(missing), desc=name, unit="picture",
        disable=not progress,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = []
        for scene, image in _draw(bundle, missing, style):
            jobs.append(pool.submit(save, scene, image))
            bar.update()
        for job in jobs:
            job.result()
    hashes = {
        path: _pixel_hash(_decode((partial / path).read_bytes(), path)) for path in bundle.pictures
    }
    files = dict(bundle.files)
    if bundle.assemble is not None:
        files |= bundle.assemble(lambda path: (partial / path).read_bytes())
    for path, data in files.items():
        _write(partial / path, data)
    if bundle.assemble is not None:
        for path in bundle.pictures:
            (partial / path).unlink()
    os.replace(partial, target)
    return {
        "questions": bundle.questions,
        "question_files": bundle.question_hashes(),
        "files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()},
        "pictures": hashes,
    }


def _check_family(
    folder: Path, name: str, bundle: Bundle, record: Mapping[str, Any], progress: bool
) -> None:
    """Compare a finished family with the manifest and with the generator."""
    if record["question_files"] != bundle.question_hashes():
        raise QuotaError(f"{folder} holds other questions than this version writes")

    def read(path: str) -> bytes:
        try:
            return (folder / path).read_bytes()
        except OSError as error:
            raise QuotaError(f"{folder / path}: {error.strerror}") from None

    for path, digest in record["files"].items():
        if hashlib.sha256(read(path)).hexdigest() != digest:
            raise QuotaError(f"{folder / path} is damaged: its sha256 is not that of the manifest")
    if bundle.assemble is not None:
        return
    for path, digest in tqdm(
        record["pictures"].items(), desc=f"{name}: check", unit="picture", disable=not progress
    ):
        if _pixel_hash(_decode(read(path), str(folder / path))) != digest:
            raise QuotaError(
                f"{folder / path} is damaged: its pixels are not those of the manifest"
            )
