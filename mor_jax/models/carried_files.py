"""The files of a base that an export carries over: those that make its tokenizer and its generation defaults.

Each is named here; nothing else is taken, whatever it is called. What the exported model has no use for stays behind:
weights in other formats, code, a processor's settings for images, a sentence encoder's pooling.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mor_jax.models.hf_json import ModelFileError, read_json

CARRIED = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",  # its older form
    # vocabularies of the tokenizers that transformers has
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "tekken.json",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja, templates beside the default


def carried_files(directory: str | os.PathLike) -> dict[str, Path]:
    """{name in the export: the file to copy}: those of `CARRIED`, and all templates of `CHAT_TEMPLATES`.

    A link is followed within its folder, and within its repository in a cache of the Hugging Face hub, whose snapshots
    are folders of links.

    Raises:
      ModelFileError: one of them leads out of there, or is no file.
    """
    directory = Path(directory)
    names = [name for name in (*CARRIED, *_versioned(directory)) if os.path.lexists(directory / name)]
    templates = directory / CHAT_TEMPLATES
    if os.path.lexists(templates):
        if not templates.is_dir():
            raise ModelFileError(f"{templates}: must be a folder of chat templates; take it away or make it one")
        names += [f"{CHAT_TEMPLATES}/{name}" for name in sorted(os.listdir(templates)) if name.endswith(".jinja")]
    home = _home(directory.resolve())
    return {name: _regular_file(directory / name, home) for name in names}


def copy_files(files: dict[str, Path], folder: Path) -> None:
    """Copies the contents of `carried_files` into an export, with the permissions of any new file."""
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)


def _versioned(directory: Path) -> list[str]:
    """`tokenizer.4.0.0.json` and the like, which `tokenizer_config.json` lists for later versions of the library."""
    if not (directory / "tokenizer_config.json").is_file():
        return []
    listed = read_json(directory / "tokenizer_config.json").get("fast_tokenizer_files")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return [name for name in names if name not in CARRIED and _is_versioned(name)]


def _is_versioned(name: str) -> bool:
    version = name.removeprefix("tokenizer.").removesuffix(".json")
    return name == f"tokenizer.{version}.json" and all(part.isdecimal() for part in version.split("."))


def _home(directory: Path) -> Path:
    """The folder that links may lead to: the directory itself, or its repository in a cache of the hub."""
    for snapshots in directory.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return directory


def _regular_file(file: Path, home: Path) -> Path:
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ModelFileError(f"{file}: a link that leads nowhere; put the file there or take the link away") from None
    if not target.is_relative_to(home):
        raise ModelFileError(
            f"{file}: leads out of {home} and is not copied into an export; put a copy of {target} in its place"
        )
    if not target.is_file():
        raise ModelFileError(f"{file}: is no regular file and cannot be copied into an export; take it away")
    return target
