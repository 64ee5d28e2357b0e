"""Dataset configuration: a TOML, JSON or Python dict, checked and resolved into plain values. Reads no images.

A value is looked for in the subset, its dataset, `[general]`, the command line, then the default below.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import voluptuous

from library.base.errors import Problem, UserError, nearest, raise_problems

INTERPOLATIONS = ("lanczos", "lanczos4", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How the captions of a subset become the text the model sees; see `library.data.captions`."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0

    @property
    def varies(self) -> bool:
        """Whether an image has different texts at different visits, dropped captions aside."""
        return bool(
            self.shuffle_caption or self.enable_wildcard or self.token_warmup_step or self.caption_tag_dropout_rate
        )

    @property
    def drops(self) -> bool:
        """Whether some visits get an empty text."""
        return bool(self.caption_dropout_rate or self.caption_dropout_every_n_epochs)


@dataclass(frozen=True, kw_only=True)
class SubsetPlan:
    """One folder of images, or the images that one metadata file lists, with their own settings.

    Attributes:
        image_dir: the folder; None when `metadata_file` holds absolute paths.
        metadata_file: JSON or JSON Lines file that lists images and captions instead of the folder and text files.
        conditioning_data_dir: folder of control images or loss masks, named as the images.
        class_tokens: text of images without caption.
        cache_info: keep image sizes in `metadata_cache.json` in the folder.
        face_crop_aug_range: crop around the face marked in the file name; side of the crop over side of the face.
        loss_weight: factor of the loss of these images.
        custom_attributes: handed on to the training; see `docs/datasets.md` for those that have an effect.
        validation_split: share of the images that is only validated on.
        validation_seed: seed of that choice; the run's seed when None.
    """

    image_dir: Path | None
    captions: CaptionRules
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    loss_weight: float = 1.0
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    validation_split: float = 0.0
    validation_seed: int | None = None

    @property
    def name(self) -> str:
        """Name of the folder or metadata file, as metadata and records show it."""
        place = self.metadata_file or self.image_dir
        assert place is not None
        return place.name

    @property
    def changes_pixels(self) -> bool:
        """Whether an image looks different at different visits beyond mirroring, so that latents cannot be kept."""
        return self.color_aug or self.random_crop or self.face_crop_aug_range is not None


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """Subsets that share resolution, buckets and batch size; a batch never mixes datasets."""

    resolution: tuple[int, int]  # width, height
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetPlan, ...]


@dataclass(frozen=True)
class _Key:
    levels: str  # of G(eneral), D(ataset), S(ubset)
    check: Any
    default: Any = None
    flag: str | None = None  # name on the command line, where it differs


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise voluptuous.Invalid("expected a number")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise voluptuous.Invalid("expected a whole number")
    return value


def _range(value: Any) -> tuple[float, float]:
    """[low, high] or the text "low,high"."""
    if isinstance(value, str):
        try:
            value = [float(part) for part in value.split(",")]
        except ValueError as error:
            raise voluptuous.Invalid("expected two numbers as [2.0, 4.0]") from error
    pair = isinstance(value, list | tuple) and len(value) == 2
    if not pair or any(isinstance(v, bool) or not isinstance(v, int | float) or v <= 0 for v in value):
        raise voluptuous.Invalid("expected two numbers above 0 as [2.0, 4.0]")
    if value[0] > value[1]:
        raise voluptuous.Invalid("expected the smaller number first")
    return float(value[0]), float(value[1])


def _resolution(value: Any) -> tuple[int, int]:
    """512, [512, 768] (width, height), or the same as text."""
    if isinstance(value, str):
        try:
            value = [int(part) for part in value.split(",")]
        except ValueError as error:
            raise voluptuous.Invalid("expected a number, or width and height as [512, 768]") from error
    values = [value] if isinstance(value, int) else value
    right = isinstance(values, list | tuple) and len(values) in (1, 2)
    if not right or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise voluptuous.Invalid("expected a number, or width and height as [512, 768]")
    return values[0], values[-1]


_DATASET_KEYS = {
    "resolution": _Key("GD", _resolution),
    "batch_size": _Key("GD", voluptuous.All(_whole, voluptuous.Range(min=1)), 1, "train_batch_size"),
    "enable_bucket": _Key("GD", bool, False),
    "min_bucket_reso": _Key("GD", voluptuous.All(_whole, voluptuous.Range(min=1)), 256),
    "max_bucket_reso": _Key("GD", voluptuous.All(_whole, voluptuous.Range(min=1)), 1024),
    "bucket_reso_steps": _Key("GD", voluptuous.All(_whole, voluptuous.Range(min=1)), 64),
    "bucket_no_upscale": _Key("GD", bool, False),
    "network_multiplier": _Key("GD", _number, 1.0),
}
_RATE = voluptuous.All(_number, voluptuous.Range(min=0, max=1))
_CAPTION_KEYS = {
    "shuffle_caption": _Key("GDS", bool, False),
    "caption_separator": _Key("GDS", str, ","),
    "keep_tokens": _Key("GDS", _whole, 0),
    "keep_tokens_separator": _Key("GDS", str, ""),
    "secondary_separator": _Key("GDS", str),
    "enable_wildcard": _Key("GDS", bool, False),
    "caption_prefix": _Key("GDS", str),
    "caption_suffix": _Key("GDS", str),
    "caption_dropout_rate": _Key("GDS", _RATE, 0.0),
    "caption_dropout_every_n_epochs": _Key("GDS", _whole, 0),
    "caption_tag_dropout_rate": _Key("GDS", _RATE, 0.0),
    "token_warmup_min": _Key("GDS", _whole, 1),
    "token_warmup_step": _Key("GDS", _number, 0),
}
_SUBSET_KEYS = {
    "num_repeats": _Key("GDS", _whole, 1, "dataset_repeats"),
    "flip_aug": _Key("GDS", bool, False),
    "resize_interpolation": _Key("GDS", voluptuous.In(INTERPOLATIONS)),
    "caption_extension": _Key("GDS", str, ".caption"),
    "class_tokens": _Key("GDS", str),
    "cache_info": _Key("GDS", bool, False),
    "color_aug": _Key("GDS", bool, False),
    "random_crop": _Key("GDS", bool, False),
    "face_crop_aug_range": _Key("GDS", _range),
    "alpha_mask": _Key("GDS", bool, False),
    "loss_weight": _Key("GDS", voluptuous.All(_number, voluptuous.Range(min=0)), 1.0),
    "custom_attributes": _Key("GDS", dict, {}),
    "validation_split": _Key("GDS", _RATE, 0.0),
    "validation_seed": _Key("GDS", _whole),
    "image_dir": _Key("S", str),
    "metadata_file": _Key("S", str),
    "conditioning_data_dir": _Key("S", str),
    "is_reg": _Key("S", bool, False),
}
_FOLDERS = ("image_dir", "metadata_file", "conditioning_data_dir")
_ALL = {**_DATASET_KEYS, **_CAPTION_KEYS, **_SUBSET_KEYS}


def _schema() -> voluptuous.Schema:
    def level(letter: str) -> dict[Any, Any]:
        return {voluptuous.Optional(name): key.check for name, key in _ALL.items() if letter in key.levels}

    subset = level("S")
    dataset = {**level("D"), voluptuous.Optional("subsets"): [subset]}
    return voluptuous.Schema({voluptuous.Optional("general"): level("G"), voluptuous.Required("datasets"): [dataset]})


def read_config(path: str | Path) -> dict[str, Any]:
    """The dictionary in a `.toml` or `.json` file.

    Raises:
        UserError: missing file, other extension, or a syntax error with its position.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("--dataset_config", str(path), "no such file")
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError("--dataset_config", str(path), "expected a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except (ValueError, OSError) as error:
        raise UserError("--dataset_config", str(path), f"cannot be read: {error}") from error


def resolve_datasets(
    config: Mapping[str, Any], command_line: Mapping[str, Any], *, source: str = "--dataset_config"
) -> list[DatasetPlan]:
    """Check a dataset configuration and fill in every value.

    Args:
        config: keys `general` and `datasets`.
        command_line: values of flags that stand in where the file is silent; None means not given.
        source: file name for error messages.

    Raises:
        UserError: every problem found, each with its place, value and remedy.
    """
    try:
        checked = _schema()(dict(config))
    except voluptuous.MultipleInvalid as error:
        raise UserError(problems=[_as_problem(one, config, source) for one in error.errors]) from error
    if not checked["datasets"]:
        raise UserError(source, message="has no [[datasets]]")
    problems: list[Problem] = []
    plans = [
        _resolve_dataset(dataset, checked.get("general", {}), command_line, f"{source}: datasets[{index}]", problems)
        for index, dataset in enumerate(checked["datasets"])
    ]
    raise_problems(problems)
    return [plan for plan in plans if plan is not None]


def _as_problem(error: voluptuous.Invalid, config: Mapping[str, Any], source: str) -> Problem:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path).lstrip(".")
    where = f"{source}: {path}"
    if "extra keys" in error.error_message:
        name = str(error.path[-1])
        level = {1: "GD"}.get(len(error.path), "S" if "subsets" in map(str, error.path) else "GD")
        elsewhere = f"belongs to another level ({_levels(name)})" if name in _ALL else None
        guess = nearest(name, [key for key, entry in _ALL.items() if set(level) & set(entry.levels)])
        return Problem(where, elsewhere or "unknown key" + (f"; did you mean {guess}?" if guess else ""))
    value: Any = config
    try:
        for part in error.path:
            value = value[getattr(part, "schema", part)]
    except (KeyError, IndexError, TypeError):
        return Problem(where, error.error_message)
    return Problem(where, error.error_message, value)


def _levels(name: str) -> str:
    words = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]"}
    return ", ".join(words[letter] for letter in _ALL[name].levels)


def _lookup(name: str, key: _Key, sources: Iterable[Mapping[str, Any]], command_line: Mapping[str, Any]) -> Any:
    for source in sources:
        if source.get(name) is not None:
            return source[name]
    given = command_line.get(key.flag or name)
    return key.default if given is None else given


def _resolve_dataset(
    dataset: Mapping[str, Any],
    general: Mapping[str, Any],
    command_line: Mapping[str, Any],
    where: str,
    problems: list[Problem],
) -> DatasetPlan | None:
    values = {name: _lookup(name, key, (dataset, general), command_line) for name, key in _DATASET_KEYS.items()}
    problems.extend(_dataset_problems(values, where))
    if values["network_multiplier"] != 1.0:
        problems.append(Problem(f"{where}.network_multiplier", "no training uses this value; remove the key"))
    subsets = [
        _resolve_subset(subset, dataset, general, command_line, f"{where}.subsets[{index}]", problems)
        for index, subset in enumerate(dataset.get("subsets", []))
    ]
    if not subsets:
        problems.append(Problem(where, "has no [[datasets.subsets]]"))
    kept = _without_duplicates([subset for subset in subsets if subset is not None], where, problems)
    if values["resolution"] is None:
        return None
    del values["network_multiplier"]
    values["resolution"] = _resolution(values["resolution"])
    return DatasetPlan(**values, subsets=tuple(kept))


def _dataset_problems(values: Mapping[str, Any], where: str) -> Iterable[Problem]:
    if values["resolution"] is None:
        yield Problem(f"{where}.resolution", "is needed: set it here, in [general] or with --resolution")
        return
    try:
        resolution = _resolution(values["resolution"])
    except voluptuous.Invalid as error:
        yield Problem("--resolution", error.error_message, values["resolution"])
        return
    if not values["enable_bucket"]:
        return
    step = values["bucket_reso_steps"]
    low = values["min_bucket_reso"] // step * step
    high = -(-values["max_bucket_reso"] // step) * step
    if min(resolution) < low:
        yield Problem(f"{where}.min_bucket_reso", f"must not exceed the resolution {resolution}", low)
    if max(resolution) > high:
        yield Problem(f"{where}.max_bucket_reso", f"must not be below the resolution {resolution}", high)


def _resolve_subset(
    subset: Mapping[str, Any],
    dataset: Mapping[str, Any],
    general: Mapping[str, Any],
    command_line: Mapping[str, Any],
    where: str,
    problems: list[Problem],
) -> SubsetPlan | None:
    sources = (subset, dataset, general)
    values = {
        # folders belong to one subset; flags that name some make datasets of their own
        name: subset.get(name) if name in _FOLDERS else _lookup(name, key, sources, command_line)
        for name, key in _SUBSET_KEYS.items()
    }
    rules = CaptionRules(**{name: _lookup(name, key, sources, command_line) for name, key in _CAPTION_KEYS.items()})
    if values["image_dir"] is None and values["metadata_file"] is None:
        problems.append(Problem(f"{where}.image_dir", "is needed: the folder with the images"))
        return None
    if values["num_repeats"] < 1:
        problems.append(Problem(f"{where}.num_repeats", "expected 1 or more", values["num_repeats"]))
    if values["is_reg"] and values["metadata_file"]:
        problems.append(Problem(f"{where}.is_reg", "regularization images come from folders, not from a metadata file"))
    if isinstance(values["face_crop_aug_range"], str):  # from the command line
        values["face_crop_aug_range"] = _range(values["face_crop_aug_range"])
    extension = values["caption_extension"]
    values["caption_extension"] = extension if extension.startswith(".") else f".{extension}"
    for name in _FOLDERS:
        values[name] = Path(values[name]) if values[name] is not None else None
    return SubsetPlan(**values, captions=rules)


def _without_duplicates(subsets: list[SubsetPlan], where: str, problems: list[Problem]) -> list[SubsetPlan]:
    """Two subsets over the same files would share captions and caches; real paths are compared."""
    seen: dict[tuple[Path | None, ...], int] = {}
    for index, subset in enumerate(subsets):
        place = tuple(path.resolve() if path else None for path in (subset.image_dir, subset.metadata_file))
        if subset.metadata_file is not None:
            place = (None, place[1])
        if place in seen:
            name = "metadata_file" if subset.metadata_file else "image_dir"
            problems.append(
                Problem(
                    f"{where}.subsets[{index}].{name}",
                    f"is the one of subsets[{seen[place]}] too; use num_repeats to see its images more often",
                    str(subset.metadata_file or subset.image_dir),
                )
            )
        seen.setdefault(place, index)
    return subsets
