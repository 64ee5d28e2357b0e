"""The `ss_*` metadata of adapter files. Every value becomes text; None is "None"."""

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from library.base.hashes import model_hashes
from library.base.logs import logger
from library.config_util import SubsetPlan
from library.data.dataset import ImageSet
from library.options.rates import rewritten_rates
from library.options.schema import OptionSet

_MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# ss_<name> = the flag of the same name
_AS_GIVEN = [
    "output_name",
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_dropout",
    "mixed_precision",
    "v2",
    "clip_skip",
    "max_token_length",
    "cache_latents",
    "lowram",
    "noise_offset",
    "multires_noise_iterations",
    "multires_noise_discount",
    "adaptive_noise_scale",
    "zero_terminal_snr",
    "training_comment",
    "max_grad_norm",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "face_crop_aug_range",
    "prior_loss_weight",
    "min_snr_gamma",
    "scale_weight_norms",
    "ip_noise_gamma",
    "noise_offset_random_strength",
    "ip_noise_gamma_random_strength",
    "loss_type",
    "huber_schedule",
    "huber_scale",
    "huber_c",
    "fp8_base",
    "fp8_base_unet",
    "full_fp16",
    "validation_seed",
    "validation_split",
    "max_validation_steps",
    "validate_every_n_epochs",
    "validate_every_n_steps",
    "resize_interpolation",
    "network_dim",
    "network_alpha",
]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What metadata tells besides the options.

    Attributes:
        session_id: number of the run.
        started_at: seconds since 1970.
        seed: of the run.
        network_module: where the network came from.
        network_args: its arguments, None when none were given.
        base_model_version: of the model.
        optimizer: `module.Class(k=v,...)`.
        num_batches: per epoch and process.
        num_epochs: epochs begun.
        max_steps: optimizer steps.
        sets: images trained on.
        num_validation_images: images held out.
        commit: version of this program.
    """

    session_id: int
    started_at: float
    seed: int
    network_module: str
    network_args: Mapping[str, Any] | None
    base_model_version: str
    optimizer: str
    num_batches: int
    num_epochs: int
    max_steps: int
    sets: Sequence[ImageSet]
    num_validation_images: int
    commit: str


def training_metadata(options: OptionSet, facts: TrainingFacts, family_keys: Sequence[str]) -> dict[str, str]:
    """Everything that is known before training.

    Args:
        options: all options.
        facts: what the run found out.
        family_keys: further flags the family writes as `ss_<flag>`.
    """
    given = {**options.values(), **rewritten_rates(options)}
    entries: dict[str, Any] = {f"ss_{name}": given.get(name) for name in (*_AS_GIVEN, *family_keys)}
    rates = given.get("text_encoder_lr")
    entries |= {
        "ss_cache_latents": bool(given.get("cache_latents") or given.get("cache_latents_to_disk")),
        "ss_text_encoder_lr": rates[0] if rates and len(rates) == 1 else rates,
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_seed": facts.seed,
        "ss_num_train_images": sum(images.num_train_images for images in facts.sets),
        "ss_num_reg_images": sum(images.num_reg_images for images in facts.sets),
        "ss_num_validation_images": facts.num_validation_images,
        "ss_num_batches_per_epoch": facts.num_batches,
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.max_steps,
        "ss_network_module": facts.network_module,
        "ss_base_model_version": facts.base_model_version,
        "ss_optimizer": facts.optimizer,
        "ss_debiased_estimation": bool(given.get("debiased_estimation_loss")),
        "ss_sd_scripts_commit_hash": facts.commit,
    }
    if facts.network_args is not None:
        entries["ss_network_args"] = json.dumps(facts.network_args)
    entries |= dataset_metadata(facts.sets)
    return {key: str(value) for key, value in entries.items()}


def minimum_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `--no_metadata` keeps."""
    return {key: metadata[key] for key in _MINIMUM if key in metadata}


def tag_frequency(images: ImageSet, subset: int) -> dict[str, int]:
    """How many captions of a subset hold each comma-separated tag, in order of appearance."""
    counts: Counter[str] = Counter()
    for record in images.records:
        if record.subset == subset:
            counts.update(tag.strip().lower() for tag in record.caption.split(",") if tag.strip())
    return dict(counts)


def dataset_metadata(sets: Sequence[ImageSet]) -> dict[str, str]:
    """`ss_datasets`, `ss_tag_frequency` and `ss_dataset_dirs` as JSON."""
    datasets, frequencies, folders = [], {}, {}
    for images in sets:
        tags = {subset.name: tag_frequency(images, n) for n, subset in enumerate(images.plan.subsets)}
        frequencies = {**tags, **frequencies}
        datasets.append(_describe(images, tags))
        for index, subset in enumerate(images.plan.subsets):
            if not subset.is_reg:
                name = _free_name(subset.name, folders)
                folders[name] = {"n_repeats": subset.num_repeats, "img_count": _count(images, index)}
    return {
        "ss_datasets": json.dumps(datasets),
        "ss_tag_frequency": json.dumps(frequencies),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    number, candidate = 2, name
    while candidate in taken:
        candidate = f"{name} ({number})"
        number += 1
    return candidate


def _count(images: ImageSet, subset: int) -> int:
    return sum(record.subset == subset for record in images.records)


def _describe(images: ImageSet, tags: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    plan = images.plan
    bucket_info = None
    if plan.enable_bucket:
        counts = images.ordered().bucket_counts()
        errors = [
            abs(place.bucket[0] / place.bucket[1] - record.size[0] / record.size[1])
            for record, place, visits in zip(images.records, images.placements, images.repeats)
            for _ in range(visits)
        ]
        bucket_info = {
            "buckets": {str(n): {"resolution": list(b), "count": c} for n, (b, c) in enumerate(counts.items())},
            "mean_img_ar_error": sum(errors) / len(errors),
        }
    return {
        "is_dreambooth": not any(subset.metadata_file for subset in plan.subsets),
        "batch_size_per_device": plan.batch_size,
        "num_train_images": images.num_train_images,
        "num_reg_images": images.num_reg_images,
        "resolution": list(plan.resolution),
        "enable_bucket": plan.enable_bucket,
        "min_bucket_reso": plan.min_bucket_reso,
        "max_bucket_reso": plan.max_bucket_reso,
        "tag_frequency": tags,
        "bucket_info": bucket_info,
        "resize_interpolation": None,
        "subsets": [_describe_subset(images, index) for index in range(len(plan.subsets))],
    }


def _describe_subset(images: ImageSet, index: int) -> dict[str, Any]:
    subset = images.plan.subsets[index]
    rules = asdict(subset.captions)
    names = [
        "shuffle_caption",
        "keep_tokens",
        "keep_tokens_separator",
        "secondary_separator",
        "enable_wildcard",
        "caption_prefix",
        "caption_suffix",
    ]
    return {
        "img_count": _count(images, index),
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        **{name: rules[name] for name in names},
        "resize_interpolation": subset.resize_interpolation,
        **_origin(subset),
    }


def _origin(subset: SubsetPlan) -> dict[str, Any]:
    """Where the images come from; no full paths, which would tell of the user's machine."""
    if subset.metadata_file is not None:
        return {"metadata_file": subset.metadata_file.name}
    return {"image_dir": subset.name, "class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


class ModelHashes:
    """Hashes of the base model's files, computed beside training since large files take their time.

    Args:
        files: metadata word ("sd_model", "vae") -> path as the user gave it, or None.
    """

    def __init__(self, files: Mapping[str, str | None]) -> None:
        self._files = {word: path for word, path in files.items() if path}
        self._found: dict[str, tuple[str, str]] = {}
        # a daemon: a run that stops early must not wait for it
        self._thread = threading.Thread(target=self._compute, name="model hashes", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for word, path in self._files.items():
            try:
                if Path(path).is_file():
                    self._found[word] = model_hashes(path)
            except OSError as error:
                logger.warning("%s could not be hashed: %s", path, error)

    def metadata(self) -> dict[str, str]:
        """`ss_<word>_hash`, `ss_new_<word>_hash` and `ss_<word>_name`; waits until they are known."""
        self._thread.join()
        entries: dict[str, str] = {}
        for word, path in self._files.items():
            entries[f"ss_{word}_name"] = Path(path).name if Path(path).exists() else path
            if word in self._found:
                legacy, full = self._found[word]
                entries |= {f"ss_{word}_hash": legacy, f"ss_new_{word}_hash": full}
        return entries
