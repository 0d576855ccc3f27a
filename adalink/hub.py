"""Adapter folders on the hub: fetched by name, and uploaded. Whatever the client raises becomes one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from adalink.errors import ConfigError

__all__ = ["local_folder", "upload"]


def local_folder(folder: str | Path) -> Path:
    """The folder itself, or the downloaded one of a hub name. Raises ConfigError for a name that leads to neither."""
    if Path(folder).is_dir() or isinstance(folder, Path):
        return Path(folder)
    from huggingface_hub import snapshot_download  # ships with transformers

    try:
        return Path(snapshot_download(folder, allow_patterns=["*.json", "*.safetensors", "README.md"]))
    except Exception as error:  # of the hub's client, of the HTTP library that it happens to use, of the disk
        raise ConfigError(f"{folder} is neither a folder nor an adapter on the hub ({type(error).__name__}): check the name") from error


def upload(repository: str, private: bool, write: Callable[[Path], None]) -> str:
    """Upload the folder that `write` fills; the address of the commit comes back.

    Raises ConfigError where the hub cannot be reached or does not let us in; the folder is written first, so an adapter that
    cannot be saved creates no repository.
    """
    from huggingface_hub import HfApi  # ships with transformers

    api = HfApi()
    with TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload adapter"))
        except Exception as error:  # as above
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".")
            raise ConfigError(
                f"the adapter was not uploaded to {repository} ({type(error).__name__}: {first}): "
                "check the name, the connection, and that you are logged in (`hf auth login`)"
            ) from error
