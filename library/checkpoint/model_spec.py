"""`modelspec.*` metadata, version 1.0.1."""

import base64
import mimetypes
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from library.base.logs import logger
from library.options.metadata import MetadataOptions

_OPTIONAL = ("author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor")


def model_spec_metadata(
    options: MetadataOptions,
    family: Mapping[str, str],
    *,
    suffix: str,
    title: str,
    resolution: str | None,
    version: str,
    extra: Mapping[str, str | None],
) -> dict[str, str]:
    """Entries for a file's metadata.

    Args:
        options: what the user wrote about the result.
        family: architecture, implementation, default resolution and, where it applies, prediction_type.
        suffix: appended to the architecture, e.g. "/lora".
        title: stands in for `--metadata_title`.
        resolution: "WxH" that was trained, or None for the family's default.
        version: of this program.
        extra: further entries; None values are left out.
    """
    entries: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": family["architecture"] + suffix,
        "implementation": family["implementation"],
        "prediction_type": family.get("prediction_type"),
        "title": options.metadata_title or title,
        "resolution": resolution or family["resolution"],
        "date": datetime.now().isoformat(timespec="seconds"),
        "implementation_version": f"diffusion-scripts/{version}",
        **{name: getattr(options, f"metadata_{name}") for name in _OPTIONAL},
        "thumbnail": _data_url(options.metadata_thumbnail),
        "is_negative_embedding": options.metadata_is_negative_embedding,
        **extra,
    }
    return {f"modelspec.{key}": str(value) for key, value in entries.items() if value is not None}


def _data_url(path: str | None) -> str | None:
    """An image file as a data URL; URLs pass through, a missing file is left out with a warning."""
    if not path or path.startswith("data:"):
        return path
    if not Path(path).is_file():
        logger.warning("--metadata_thumbnail %s: no such file, left out", path)
        return None
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
