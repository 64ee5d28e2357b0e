"""Copies of results and states on the Hugging Face hub, and states that are fetched from it.

huggingface_hub is imported when it is used. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` mean what they mean everywhere.
"""

import glob
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from library.base.errors import UserError
from library.base.logs import logger
from library.options.hub import HubOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_STATE_FILES = ("state.json", "train_state.json", "optimizer.bin")


def _api(token: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token or None)


def _reason(error: BaseException, token: str | None) -> str:
    """What went wrong, in one line without the token; of a chain of errors the one that says most."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = error.server_message or text
        text = f"HTTP {error.response.status_code}, {' '.join(said.split())}"
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text.replace(token, "***") if token else text


@dataclass(frozen=True)
class Repository:
    """A repository that results go to.

    Attributes:
        api: client with the token.
        name: owner/name.
        kind: model, dataset or space.
        folder: inside of it; empty for its root.
        token: as given; None when the library finds one itself.
    """

    api: Any
    name: str
    kind: str
    folder: str
    token: str | None

    def place(self, path: Path) -> str:
        """Where a file or folder goes inside the repository."""
        return f"{self.folder}/{path.name}" if self.folder else path.name

    def upload(self, held: Path, place: str) -> None:
        """Upload a file, or a folder's files, in one commit: all of it is there or nothing.

        Args:
            held: what to read.
            place: its path in the repository.

        Raises:
            Exception: whatever the network, the hub or the disk has to say.
        """
        from huggingface_hub import CommitOperationAdd

        if held.is_dir():
            files = sorted(path for path in held.rglob("*") if path.is_file())
            pairs = [(path, f"{place}/{path.relative_to(held).as_posix()}") for path in files]
        else:
            pairs = [(held, place)]
        self.api.create_commit(
            repo_id=self.name,
            repo_type=self.kind,
            operations=[CommitOperationAdd(path_or_fileobj=str(path), path_in_repo=inside) for path, inside in pairs],
            commit_message=f"Upload {place}",
        )

    def command(self, path: Path) -> str:
        """What to type to upload by hand; without the token."""
        parts = ["hf", "upload", self.name, str(path), self.place(path)]
        return shlex.join(parts + (["--repo-type", self.kind] if self.kind != "model" else []))


def open_repository(options: HubOptions) -> Repository | None:
    """Make the repository of the options if there is none, and look whether the token may write to it.

    Returns:
        None when nothing is to be uploaded.

    Raises:
        UserError: no connection, a wrong token, a missing permission, a name that is none.
    """
    name = options.huggingface_repo_id
    if not name:
        return None
    visibility = options.huggingface_repo_visibility
    if visibility not in (None, "public", "private"):
        logger.warning("--huggingface_repo_visibility %s: anything but public means private", visibility)
    token, kind = options.huggingface_token, options.repo_type
    api = _api(token)
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        try:
            _check_access(api, name, kind)
        except RepositoryNotFoundError:
            if kind == "space":  # it has a program, which is not for us to choose
                raise
            name = api.create_repo(name, repo_type=kind, private=not options.is_public, exist_ok=True).repo_id
            _check_access(api, name, kind)
        private = api.repo_info(name, repo_type=kind).private
    except Exception as error:
        message = (
            f"cannot be uploaded to: {_reason(error, token)}; check the name, the token (HF_TOKEN, `hf auth login` or "
            "--huggingface_token; it needs permission to write) and the connection, or leave the flag out"
        )
        raise UserError("--huggingface_repo_id", name, message) from error
    if not private and not options.is_public:
        logger.warning(
            "the repository %s is there already and is public: everybody will see what is uploaded (a private one was "
            "asked for; --huggingface_repo_visibility acts only when it is made)",
            name,
        )
    folder = (options.huggingface_path_in_repo or "").strip("/")
    return Repository(api, name, kind, folder, token)


def _check_access(api: "HfApi", name: str, kind: str) -> None:
    try:
        api.auth_check(name, repo_type=kind, write=True)
    except TypeError:  # a version of the library that cannot ask for more than reading
        api.auth_check(name, repo_type=kind)


@dataclass
class _Upload:
    """Something on its way.

    Attributes:
        path: of the result or state.
        held: what is read: the path itself, or what keeps its content whatever happens to it.
    """

    path: Path
    held: Path

    def let_go(self) -> None:
        """Remove what kept the content."""
        if self.held != self.path:
            shutil.rmtree(self.held.parent, ignore_errors=True)


class Uploader:
    """Uploads what is saved, at once or in one thread beside the training. No failure ends the training.

    What waits in the background is held by hard links (copies where there are none), so results may be replaced and
    removed meanwhile.

    Args:
        repository: where to.
        scratch: folder for the links, beside the results; it is made and removed here.
        background: upload in a thread.
        tell: is told of every end of an upload: (event, values).
    """

    def __init__(
        self,
        repository: Repository,
        scratch: Path,
        *,
        background: bool,
        tell: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self.repository = repository
        self.scratch = scratch
        self.background = background
        self.tell = tell
        self.missing: dict[Path, str] = {}
        self.uploaded: list[Path] = []
        self._said: set[str] = set()
        self._count = 0
        self._waiting: list[_Upload] = []
        self._current: _Upload | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """Upload a saved file or folder; a version of it that still waits is replaced by this one."""
        if not self.background:
            self._upload(_Upload(path, path))
            return
        try:
            held = self._hold(path)
        except OSError as error:
            self._failed(path, f"cannot be kept until it is uploaded: {error.strerror or error}")
            return
        with self._changed:
            older = [one for one in self._waiting if one.path == path]
            self._waiting = [one for one in self._waiting if one.path != path] + [_Upload(path, held)]
            self._changed.notify_all()
        for one in older:
            one.let_go()
        if self._thread is None:
            self._quiet()
            # a daemon: who stops waiting for it can end the process
            self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for everything, then say what is not on the hub and how to bring it there.

        A signal while waiting ends the process at once.
        """
        with self._changed:
            left = self._left()
        if left:
            names = ", ".join(path.name for path in left)
            logger.info(
                "waiting for %d uploads to %s: %s (Ctrl+C gives them up)", len(left), self.repository.name, names
            )
            with self._given_up_by_signals(), self._changed:
                self._changed.wait_for(lambda: not self._left())
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.uploaded:
            logger.info("uploaded to %s: %s", self.repository.name, ", ".join(path.name for path in self.uploaded))
        if self.missing:
            logger.warning("%s", "\n".join(self._missing_lines(self.missing)))

    def _missing_lines(self, missing: dict[Path, str]) -> Iterator[str]:
        yield f"not on the hub ({self.repository.name}):"
        for path, reason in missing.items():
            if path.exists():
                yield f"  {path.name} ({reason}); by hand: {self.repository.command(path)}"
            else:
                yield f"  {path.name} ({reason}); it was removed since, as it was too old"

    def _left(self) -> list[Path]:
        current = [self._current] if self._current is not None else []
        return [one.path for one in (*current, *self._waiting)]

    def _quiet(self) -> None:
        """No progress lines of uploads between those of the training."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()

    def _hold(self, path: Path) -> Path:
        self._count += 1
        place = self.scratch / str(self._count) / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.is_dir():
                shutil.copytree(path, place, copy_function=_link_or_copy)
            else:
                _link_or_copy(str(path), str(place))
        except OSError:
            shutil.rmtree(place.parent, ignore_errors=True)
            raise
        return place

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                self._current = self._waiting.pop(0)
            self._upload(self._current)
            self._current.let_go()
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _upload(self, one: _Upload) -> None:
        place = self.repository.place(one.path)
        try:
            self.repository.upload(one.held, place)
        except Exception as error:
            self._failed(one.path, _reason(error, self.repository.token))
            return
        self.missing.pop(one.path, None)
        self.uploaded = [path for path in self.uploaded if path != one.path] + [one.path]
        self.tell("uploaded", path=str(one.path), repository=self.repository.name, place=place)
        logger.debug("uploaded %s", one.path)

    def _failed(self, path: Path, reason: str) -> None:
        self.missing[path] = reason
        self.tell("upload_failed", path=str(path), repository=self.repository.name, reason=reason)
        # the same reason again and again is no news
        level = logger.info if reason in self._said else logger.warning
        self._said.add(reason)
        level("%s is not uploaded: %s; the training goes on", path.name, reason)

    @contextmanager
    def _given_up_by_signals(self) -> Iterator[None]:
        def give_up(number: int, frame: FrameType | None) -> None:
            del frame
            lost = dict.fromkeys(self._left(), "given up")
            # not through the logger: a signal may interrupt it while it holds its lock
            os.write(2, ("\n" + "\n".join(self._missing_lines({**self.missing, **lost})) + "\n").encode())
            shutil.rmtree(self.scratch, ignore_errors=True)
            os._exit(128 + number)

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, give_up)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target


def download_state(given: str, options: HubOptions) -> Path:
    """Fetch a state into the cache of huggingface_hub.

    Args:
        given: owner/repository/folder[:revision[:type]].
        options: with the token.

    Returns:
        The folder on this disk.

    Raises:
        UserError: no such name, repository, revision or state; no permission, no connection.
    """
    expected = "expected owner/repository/folder[:revision[:type]] with --resume_from_huggingface"
    name, *rest = given.split(":")
    owner, _, inside = name.partition("/")
    repository, _, folder = inside.partition("/")
    folder = folder.strip("/")
    revision, kind = [*rest, "", ""][:2]
    if not (owner and repository and folder) or len(rest) > 2 or kind not in ("", "model", "dataset", "space"):
        raise UserError("--resume", given, expected)
    api = _api(options.huggingface_token)
    where: dict[str, Any] = {
        "repo_id": f"{owner}/{repository}",
        "repo_type": kind or None,
        "revision": revision or None,
    }
    try:
        place = api.snapshot_download(**where, allow_patterns=f"{glob.escape(folder)}/*")
        found = Path(place) / folder
        states = [] if found.is_dir() else _states(api, where)
    except Exception as error:
        reason = _reason(error, options.huggingface_token)
        raise UserError("--resume", given, f"cannot be fetched from the hub: {reason}") from error
    if not found.is_dir():
        message = f"there is no such folder in {owner}/{repository}"
        raise UserError("--resume", given, message + (f"; it has states in {', '.join(states)}" if states else ""))
    return found


def _states(api: "HfApi", where: dict[str, Any]) -> list[str]:
    """Folders of a repository that hold a state."""
    files = (name.rpartition("/") for name in api.list_repo_files(**where))
    return sorted({folder for folder, _, name in files if folder and name in _STATE_FILES})
