"""Where a checkpoint's files come from: a local folder or a hub id, and no path that leaves it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.errors import QuotaError

ASSET_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel unchanged from a Hugging Face folder to a checkpoint and back."""

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A Hugging Face checkpoint folder on disk.

    `name` is what the user typed. Files may be symbolic links to anywhere below `root`: the folder
    itself, or the model's own cache folder if the hub client made it (snapshots link to blobs).
    """

    name: str
    folder: Path
    root: Path

    def path(self, file_name: str) -> Path:
        """The resolved path of a file of this folder; refuses names and links that lead outside."""
        relative = Path(file_name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in file_name:
            raise QuotaError(f"{self.folder}: file name {file_name!r} leaves the folder")
        path = (self.folder / relative).resolve()
        if not path.is_relative_to(self.root):
            raise QuotaError(f"{self.folder / relative} is a link out of the folder (to {path})")
        return path

    def has(self, file_name: str) -> bool:
        """Whether the file is there; a link that leads outside is refused, not overlooked."""
        return self.path(file_name).is_file()

    def read_json(self, file_name: str) -> dict[str, Any]:
        """A JSON object of the folder."""
        try:
            content = json.loads(self.path(file_name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QuotaError(f"{self.folder} holds no {file_name}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise QuotaError(f"{self.folder / file_name} is not readable JSON: {error}") from None
        if not isinstance(content, dict):
            raise QuotaError(f"{self.folder / file_name} does not hold a JSON object")
        return content

    def read_assets(self) -> dict[str, bytes]:
        """Tokenizer, processor, chat template and generation files, by name."""
        try:
            return {name: self.path(name).read_bytes() for name in ASSET_FILES if self.has(name)}
        except OSError as error:
            raise QuotaError(f"{error.filename} cannot be read: {error.strerror}") from None

    def pickled_files(self) -> list[str]:
        """Names of weight files that only unpickling could read."""
        return sorted(
            entry.name
            for entry in self.folder.iterdir()
            if entry.suffix in _PICKLED and entry.name != "training_args.bin"
        )

    def make_safetensors(self) -> str:
        """The command that rewrites pickled weights as safetensors (for the user; needs torch)."""
        out = Path(self.name).name + "-safetensors"
        code = (
            "import sys, transformers as t; "
            "[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) "
            "for c in (t.AutoModelForImageTextToText, t.AutoTokenizer, t.AutoImageProcessor)]"
        )
        return f"python -c {shlex.quote(code)} {shlex.quote(self.name)} {shlex.quote(out)}"


def open_source(source: str | Path) -> Source:
    """An existing folder, else the download of a hub id ("owner/name" or "owner/name@revision")."""
    name = str(source)
    folder = Path(source)
    if folder.is_dir():
        return _local(name, folder)
    if folder.exists():
        raise QuotaError(f"{name} is a file; expected a checkpoint folder or a hub id")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name):
        raise QuotaError(f"{name} is neither a folder nor a hub id (owner/name)")
    return _local(name, _download(name))


def _local(name: str, folder: Path) -> Source:
    folder = folder.resolve()
    root = folder
    # The hub client's cache: models--owner--name/{blobs, snapshots/<revision>}.
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        root = folder.parent.parent
    return Source(name=name, folder=folder, root=root)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(_DOWNLOADED)
            )
        )
    except RepositoryNotFoundError:
        raise QuotaError(
            f"{name}: no such folder, and no such hub model (or no access to it)"
        ) from None
    except Exception as error:  # the client's transport errors change class between its versions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise QuotaError(f"{name}: no such folder, and the hub answered: {reason[0]}") from None
