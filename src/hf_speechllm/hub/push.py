"""Uploads an exported folder to the Hub, after the self-check."""

import os
from pathlib import Path

from huggingface_hub import HfApi

from .self_check import self_check


ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.py", "*.model", "*.txt")


def push_folder(
    folder: str | os.PathLike,
    repository: str,
    private: bool = False,
    message: str = "Upload model",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Checks `folder` in a clean process and uploads it as one commit.

    Args:
        folder: of [`export_model`].
        repository: `"owner/name"`; created if it does not exist.
        private: visibility of a new repository.
        message: of the commit.
        token: Hub token; default the stored one.
        endpoint: address of another Hub.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the folder lacks a card, a configuration or weights.
        SelfCheckError: the folder does not work on its own.
    """
    folder = Path(folder)
    for name in ("README.md", "config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected {name}; export the model with its facts first")
    self_check(folder)
    api = HfApi(token=token, endpoint=endpoint)
    api.create_repo(repository, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message=message, allow_patterns=list(ALLOWED_FILES)
    )
    return commit.commit_url
