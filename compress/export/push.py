"""Upload a folder to the Hugging Face hub, through huggingface_hub; tokens stay with that library."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from compress.errors import CompressError, UsageError

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
_REASONS = {
    401: ("does not accept the token", _LOG_IN),
    403: (
        "does not let this token write there",
        "Give a repository of your own, or use a token that may write.",
    ),
    404: ("does not know that user or organisation", "Give --push as your-name/model-name."),
}
"""Status -> what the hub does, and what to do about it."""


def check_push(repo: str) -> None:
    """Refuse an upload that cannot work, before anything is made for it.

    Args:
        repo: ``name`` or ``owner/name``.

    Raises:
        UsageError: It is no name of a repository.
        CompressError: The hub is switched off (``HF_HUB_OFFLINE``), or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"--push {repo} is no name of a repository.",
            "Give your-name/model-name: letters, digits, dots, - and _.",
        ) from error
    if constants.is_offline_mode():
        raise CompressError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded.", "Unset it, or leave --push out."
        )
    if get_token() is None:
        raise CompressError("There is no token for the Hugging Face hub.", _LOG_IN)


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload every file of ``folder`` as one commit; the repository is made when it is not there.

    What the hub has already is not sent again.

    Args:
        folder: What to upload.
        repo: ``name`` or ``owner/name``.
        private: Whether a new repository is.

    Returns:
        The address of the repository.

    Raises:
        UsageError: See :func:`check_push`.
        CompressError: The hub cannot be reached or refuses.
    """
    check_push(repo)
    api = HfApi()
    again = f"{folder} stays as it is: the same command tries again."
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model made with compress"
        )
    except OfflineModeIsEnabled as error:
        raise CompressError("The hub is switched off.", again) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        what, remedy = _REASONS.get(status, (f"answered with status {status}", again))
        raise CompressError(f"The hub {what} ({repo}).", remedy) from error
    except Exception as error:
        if not _of_transport(error):
            raise
        raise CompressError(f"The hub cannot be reached ({type(error).__name__}).", again) from error
    return str(made)


def _of_transport(error: Exception) -> bool:
    """Whether the HTTP library failed; which one it is depends on the version of huggingface_hub."""
    return isinstance(error, ConnectionError | TimeoutError) or any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    )
