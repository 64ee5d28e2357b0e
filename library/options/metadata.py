"""Options about the texts stored in saved files."""

from dataclasses import dataclass

from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """Metadata: texts stored in the saved file."""

    metadata_title: str | None = option(None, help="title; the output name when not given")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="license")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_usage_hint: str | None = option(None, help="how to use the file")
    metadata_thumbnail: str | None = option(None, help="thumbnail: image file or data URL")
    metadata_merged_from: str | None = option(None, help="models this one was merged from")
    metadata_trigger_phrase: str | None = option(None, help="words that call the trained concept")
    metadata_preprocessor: str | None = option(None, help="preprocessor that makes the control images")
    metadata_is_negative_embedding: str | None = option(
        None, help="says that this embedding belongs into the negative prompt"
    )
    no_metadata: bool = option(False, help="store no training metadata (not recommended)")
    training_comment: str | None = option(None, help="free text stored in the metadata")
