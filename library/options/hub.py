"""Options about copies on the Hugging Face hub."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem, nearest
from library.options.schema import option

_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Hub: copies of the results on the Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        None, help="repository (owner/name) that every saved result is uploaded to; made if there is none"
    )
    huggingface_repo_type: str | None = option(None, help="type of the repository: model, dataset or space; model")
    huggingface_path_in_repo: str | None = option(
        None, help="folder inside the repository for uploads; its root when not given"
    )
    huggingface_token: str | None = option(
        None,
        help="access token; better set HF_TOKEN in the environment or use `hf auth login`, because a command line can "
        "be read by others",
    )
    huggingface_repo_visibility: str | None = option(
        None, help="of a repository that is made: public, or private when anything else or nothing is given"
    )
    save_state_to_huggingface: bool = option(
        False, help="upload saved training states too (see --save_state), with --huggingface_repo_id"
    )
    resume_from_huggingface: bool = option(
        False, help="--resume names a state on the hub: owner/repository/folder[:revision[:type]]"
    )
    async_upload: bool = option(
        False, help="upload while training goes on; the end of the run waits for what is not uploaded yet"
    )

    @property
    def repo_type(self) -> str:
        """Of the repository of uploads."""
        return self.huggingface_repo_type or "model"

    @property
    def is_public(self) -> bool:
        """Whether a repository that is made can be seen by everybody."""
        return self.huggingface_repo_visibility == "public"

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        kind = self.huggingface_repo_type
        if kind and kind not in _TYPES:
            close = nearest(kind, _TYPES)
            message = f"expected one of {', '.join(_TYPES)}" + (f"; did you mean {close!r}?" if close else "")
            yield Problem("--huggingface_repo_type", message, kind)
        folder = self.huggingface_path_in_repo
        if folder and (".." in folder.split("/") or "\\" in folder):
            message = "expected the name of a folder in the repository, with forward slashes and without .."
            yield Problem("--huggingface_path_in_repo", message, folder)
