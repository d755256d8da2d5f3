"""Publishing a model folder: everything is checked before anything is created, and a failed upload can be repeated."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from dinov3_hf.hub.architecture import read_architecture
from dinov3_hf.hub.card_validation import check_model_card, read_metadata
from dinov3_hf.hub.model_card import CARD, is_generated, model_card, with_license
from dinov3_hf.hub.model_folder import check_model_folder, files_to_push, find_model_folder

# What transformers puts into a new repository in place of a card.
_BLANK_CARD = "This model card has been automatically generated."


class PushError(OSError):
    """The Hub did not take something. Nothing on this machine has changed; the message says what to do."""


@dataclass(frozen=True)
class Pushed:
    """
    What a push did.

    Attributes:
        url: of the repository, with the branch if it is another than main.
        repository: its full name, OWNER/NAME.
        revision: the branch.
        commit: its newest commit, hexadecimal.
        folder: the model folder that was pushed.
        files: names of its files on the Hub.
        left_out: names of what stayed here.
        has_code: whether transformers needs the code that comes with the model.
        has_license: whether the card states a licence.
        kept_card: whether the repository has an edited card, which was left alone.
    """

    url: str
    repository: str
    revision: str
    commit: str
    folder: Path
    files: list[str]
    left_out: list[str]
    has_code: bool
    has_license: bool
    kept_card: bool


def create_repository(repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """
    Make sure that a repository exists and that the user may write to it.

    Args:
        repository: OWNER/NAME, or NAME for the user's own.
        private: of a new repository; None is the account's default.
        token: of the Hub; None takes the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        Its full name, OWNER/NAME.

    Raises:
        ValueError: `repository` is no name.
        PushError: as in `push_folder`.
    """
    _check_name(repository)
    api = HfApi(token=token)
    if token is None and get_token() is None:
        raise PushError(f"you are not logged in to {api.endpoint}; run `hf auth login`, or set HF_TOKEN.")
    with _errors_in_one_line(api.endpoint, repository):
        return api.create_repo(repository, private=private, exist_ok=True).repo_id


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """
    Upload a model folder to the Hub, or to whatever `HF_ENDPOINT` names.

    Args:
        folder: a model folder, or the output folder of a run, of which `teacher/` is taken.
        repository: OWNER/NAME, or NAME for the user's own; created when absent.
        private: of a new repository; None is the account's default.
        license: to be stated in a card that we write: an identifier of the Hub, or "dinov3-license" for weights
            derived from the released ones.
        revision: the branch, created when absent; None is main.
        message: of the commit.
        token: of the Hub; None takes the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        FileNotFoundError: there is no such model folder, or it has no weights.
        ValueError: a file is damaged, the card is not valid, `repository` is no name, or somebody has edited the card
            so that `license` cannot be written into it.
        PushError: the Hub cannot be reached, does not know the user, or refuses something.
    """
    folder = find_model_folder(folder)
    check_model_folder(folder)
    _check_name(repository)
    card = _card(folder, repository, license)
    check_model_card(card)
    paths, left_out = files_to_push(folder)
    repository = create_repository(repository, private=private, token=token)
    api = HfApi(token=token)
    with _errors_in_one_line(api.endpoint, repository):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        kept_card = is_generated(card) and _has_edited_card(api, repository, revision)
        operations = [CommitOperationAdd(path.name, path) for path in paths if path.name != CARD]
        if not kept_card:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        commit = api.create_commit(
            repository, operations, commit_message=message or f"Upload {folder.resolve().name}", revision=revision
        )
    return Pushed(
        url=f"{api.endpoint}/{repository}" + (f"/tree/{revision}" if revision else ""),
        repository=repository,
        revision=revision or "main",
        commit=commit.oid,
        folder=folder,
        files=sorted(operation.path_in_repo for operation in operations),
        left_out=[path.name for path in left_out],
        has_code=not read_architecture(folder).is_stock,
        has_license="license" in read_metadata(card),
        kept_card=kept_card,
    )


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"{repository!r} is no name of a repository; write OWNER/NAME with letters, digits, -, _ and ."
        ) from error


def _card(folder: Path, repository: str, license: str | None) -> str:
    path = folder / CARD
    if not path.is_file():
        return model_card(folder, title=repository.rpartition("/")[2], license=license)
    try:
        card = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}); save it in that encoding.") from error
    if license is None:
        return card
    if not is_generated(card):
        raise ValueError(f"{path} has been edited; write `license: {license}` into its front matter yourself.")
    return with_license(card, license)


def _has_edited_card(api: HfApi, repository: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(api.hf_hub_download(repository, CARD, revision=revision, local_dir=folder))
        except EntryNotFoundError:
            return False
        card = path.read_text(encoding="utf-8", errors="replace")
    return not is_generated(card) and _BLANK_CARD not in card


@contextlib.contextmanager
def _errors_in_one_line(endpoint: str, repository: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise PushError(_explained(error, endpoint, repository)) from error


def _explained(error: BaseException, endpoint: str, repository: str) -> str:
    repeat = "nothing is lost: the same command goes on, and does not send again what has arrived."
    cause: BaseException = error
    while not isinstance(cause, HTTPError) and cause.__cause__ is not None:  # under "Error while uploading ..."
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        if isinstance(cause, HTTPError):
            return f"the connection to {endpoint} failed ({reason}); {repeat}"
        return f"{repository} could not be pushed to {endpoint} ({reason}); {repeat}"
    status = cause.response.status_code
    said = " ".join((cause.server_message or cause.response.reason_phrase).split()).rstrip(".")
    if status == 401:
        return f"{endpoint} does not know your token ({said}); run `hf auth login` for a new one."
    if status == 403:
        return f"you may not write to {repository} ({said}); use a token with write access, or another OWNER."
    if status == 404:
        return f"{repository} is not found at {endpoint} ({said}); check OWNER/NAME and the revision."
    if status == 409:
        return f"{repository} is being changed by somebody else ({said}); {repeat}"
    if status >= 500:
        return f"{endpoint} has a problem ({status} {said}); {repeat}"
    return f"{endpoint} refuses {repository} ({status} {said})."
