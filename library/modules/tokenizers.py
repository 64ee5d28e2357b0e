"""Find and load tokenizers without asking the network when a local copy exists."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from library.base.errors import UserError

_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
_SMALLEST_PUBLISHED = 1000  # entries; every published vocabulary is far larger


def find_tokenizer(hub_id: str, *, cache_dir: str | None, beside: Sequence[Path] = ()) -> Path | None:
    """A local folder of the tokenizer, or None.

    Looked for beside the text encoder, then in `<cache_dir>/<hub id with / as _>`.
    """
    folder = hub_id.replace("/", "_")
    candidates = [*beside, *(place.parent / folder for place in beside)]
    if cache_dir:
        candidates.append(Path(cache_dir) / folder)
    return next((place for place in candidates if _holds_tokenizer(place)), None)


def _holds_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _FILES)


class LocalTokenizer:
    """A transformers tokenizer that is read when it is first used: a run with complete caches needs none.

    Args:
        class_name: in transformers.
        folder: with the vocabulary.
        pad_id: id of the padding token, where it is not the tokenizer's own.
        settings: what else differs from the tokenizer's own settings, as transformers names it.
    """

    def __init__(
        self, class_name: str, folder: Path, pad_id: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.class_name = class_name
        self.folder = folder
        self.pad_id = pad_id
        self.settings = dict(settings or {})

    @cached_property
    def loaded(self) -> Any:
        """The tokenizer itself."""
        import transformers

        tokenizer_class = getattr(transformers, self.class_name)
        tokenizer = tokenizer_class.from_pretrained(self.folder, local_files_only=True, **self.settings)
        return _padded_with(tokenizer, self.pad_id)

    def __getattr__(self, name: str) -> Any:
        """Ids of special tokens."""
        if not name.endswith("_token_id"):
            raise AttributeError(name)
        return getattr(self.loaded, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Token ids of texts."""
        return self.loaded(*arguments, **named)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return self.loaded.get_vocab()


def _padded_with(tokenizer: Any, pad_id: int | None) -> Any:
    if pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def load_tokenizer(
    class_name: str,
    hub_id: str,
    *,
    cache_dir: str | None,
    beside: Sequence[Path] = (),
    pad_id: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """A tokenizer from a local folder, else from the hub.

    Args:
        class_name: in transformers.
        hub_id: name on the hub.
        cache_dir: folder of local copies, by name.
        beside: folders to look in first.
        pad_id: id of the padding token, where it is not the tokenizer's own.
        settings: what else differs from the tokenizer's own settings, as transformers names it.

    Raises:
        UserError: found nowhere; the text lists the places and says how to provide it.
    """
    local = find_tokenizer(hub_id, cache_dir=cache_dir, beside=beside)
    if local is not None:
        return LocalTokenizer(class_name, local, pad_id, settings)
    import transformers

    tokenizer_class = getattr(transformers, class_name)
    try:
        tokenizer = tokenizer_class.from_pretrained(hub_id, **(settings or {}))
        if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) < _SMALLEST_PUBLISHED:
            raise ValueError("no vocabulary came")  # without the files, transformers makes an empty tokenizer
    except (OSError, ValueError) as error:
        places = ", ".join(str(place) for place in beside) or "the text encoder's folder"
        raise UserError(
            "--tokenizer_cache_dir",
            cache_dir,
            f"the tokenizer {hub_id!r} is not there, not beside the model ({places}), and the hub did not give it; "
            f"put its files into <tokenizer_cache_dir>/{hub_id.replace('/', '_')}",
        ) from error
    if cache_dir:
        tokenizer.save_pretrained(Path(cache_dir) / hub_id.replace("/", "_"))
    return _padded_with(tokenizer, pad_id)


def check_vocabulary(tokenizer: Any, embedding_rows: int, *, name: str, extra_ids: Iterable[int] = ()) -> None:
    """Stop when the tokenizer can produce ids that the text encoder's embedding table does not have.

    Raises:
        UserError: tokenizer and text encoder do not belong together.
    """
    largest = max([max(tokenizer.get_vocab().values()), *extra_ids])
    if largest >= embedding_rows:
        raise UserError(
            "--tokenizer_cache_dir",
            message=f"the {name} tokenizer makes ids up to {largest}, but its text encoder has only {embedding_rows} "
            "embeddings: they do not belong together",
        )
