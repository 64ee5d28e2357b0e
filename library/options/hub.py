"""Options about uploading to the Hugging Face hub."""

from dataclasses import dataclass

from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Hub: copies of the results on the Hugging Face hub."""

    huggingface_repo_id: str | None = option(None, help="repository to upload to")
    huggingface_repo_type: str | None = option(None, help="type of the repository")
    huggingface_path_in_repo: str | None = option(None, help="folder inside the repository")
    huggingface_token: str | None = option(None, help="access token; better set HF_TOKEN in the environment")
    huggingface_repo_visibility: str | None = option(None, help="public, or private when not given")
    save_state_to_huggingface: bool = option(False, help="upload training states too")
    resume_from_huggingface: bool = option(False, help="--resume names a state on the hub")
    async_upload: bool = option(False, help="upload while training goes on")
