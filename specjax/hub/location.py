"""Finds the files of a checkpoint: a directory, a GGUF file, or the name of a model on the Hugging Face hub."""

import re
from pathlib import Path

from specjax.hub.gguf_file import SUFFIX
from specjax.runtime.errors import UserError, first_line

# "owner/name", or "owner/name/file.gguf" for one file of a repository with several.
_HUB_NAME = re.compile(
    rf"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[\w./-]+{re.escape(SUFFIX)}))?", re.ASCII
)
# What is fetched of a repository: neither PyTorch files nor copies in other formats.
_NEEDED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "draft_vocabulary.json",
)


def locate(name: str | Path) -> Path:
    """Returns the directory or the GGUF file of a checkpoint.

    Of a directory without `config.json` the only GGUF file is read. A text "owner/name" (not a Path) is looked up
    on the Hugging Face hub if no such path exists, and "owner/name/file.gguf" likewise; the hub's cache keeps what is
    fetched.

    Raises:
      UserError: if a directory has several GGUF files and no `config.json`, or the hub cannot be reached or has no such
        model. Any other path is returned even if it does not exist.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise UserError(
                f"{path} holds {len(files)} GGUF files ({files[0].name}, {files[1].name}); name one of them"
            )
        return files[0] if files else path
    hub_name = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
    return _fetch(name, hub_name["repository"], hub_name["file"]) if hub_name and not path.exists() else path


def is_gguf(path: Path) -> bool:
    """Whether a path that `locate` returned names a GGUF file."""
    return path.suffix == SUFFIX


def _fetch(name: str, repository: str, file: str | None) -> Path:
    """Downloads a repository's needed files, or one GGUF file, unless the cache has them."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=[file] if file else list(_NEEDED)))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is not a path here, and on the Hugging Face hub it needs its owner's consent; ask for it there "
            "and log in (hf auth login)"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{name} is neither a path here nor a public model on the Hugging Face hub; correct the path or the name"
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise UserError(
            f"{name} is not a path here, and the Hugging Face hub cannot be reached to look for a model of this name "
            f"({first_line(error) or type(error).__name__}); give a local directory"
        ) from None
    if file is None and not (folder / "config.json").exists():
        raise UserError(
            f"{name} on the Hugging Face hub has no config.json; if it holds GGUF files, name one of them: "
            f"{name}/FILE{SUFFIX}"
        )
    if file is not None and not (folder / file).is_file():
        raise UserError(f"{repository} on the Hugging Face hub has no file {file}; correct the name")
    return folder / file if file else folder
