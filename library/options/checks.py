"""Checks across groups that hold for every model family."""

from collections.abc import Iterator

from library.base.errors import Problem
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.captions import CaptionOptions
from library.options.data import AugmentOptions, BucketOptions, DataOptions, DatasetDict
from library.options.loss import SnrLossOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.saving import SavingOptions
from library.options.schedule import LengthOptions
from library.options.schema import OptionSet
from library.options.validation import ValidationOptions


def shared_problems(options: OptionSet, resolution_step: int) -> Iterator[Problem]:
    """Contradictions between groups.

    Args:
        options: the parsed options.
        resolution_step: image sides of the family are multiples of this.
    """
    yield from _update_problems(options)
    yield from _velocity_problems(options)
    yield from _latent_caching_problems(options)
    buckets = options.get(BucketOptions)
    if buckets is not None and buckets.bucket_reso_steps % resolution_step:
        message = f"must be a multiple of {resolution_step} for this model"
        yield Problem("--bucket_reso_steps", message, buckets.bucket_reso_steps)


def missing_problems(options: OptionSet) -> Iterator[Problem]:
    """Things every run needs that were not given."""
    if options[ModelOptions].pretrained_model_name_or_path is None:
        yield Problem("--pretrained_model_name_or_path", "is required: the base model")
    saving = options[SavingOptions]
    if saving.output_dir is None:
        yield Problem("--output_dir", "is required: the folder of the results")
    data = options.get(DataOptions)
    if data is None or DatasetDict in options:
        return
    if data.dataset_config is None and data.train_data_dir is None and data.in_json is None:
        message = "is required (or --train_data_dir for folders of images, or --in_json for a metadata file)"
        yield Problem("--dataset_config", message)
    elif data.dataset_config is None and options[BucketOptions].resolution is None:
        yield Problem("--resolution", "is required with --train_data_dir")


def _update_problems(options: OptionSet) -> Iterator[Problem]:
    if options[OptimizerOptions].fused_backward_pass and options[LengthOptions].gradient_accumulation_steps > 1:
        yield Problem("--fused_backward_pass", "cannot be combined with --gradient_accumulation_steps above 1")
    validation = options.get(ValidationOptions)
    if validation is None or validation.validation_split:
        return
    if DatasetDict not in options and options[DataOptions].dataset_config is None:
        for name in ("validate_at_first", "save_best"):
            if getattr(validation, name):
                yield Problem(f"--{name}", "needs --validation_split")


def _velocity_problems(options: OptionSet) -> Iterator[Problem]:
    loss, model = options.get(SnrLossOptions), options[ModelOptions]
    if loss is None:
        return
    if loss.scale_v_pred_loss_like_noise_pred and not model.v_parameterization:
        yield Problem("--scale_v_pred_loss_like_noise_pred", "needs --v_parameterization")
    if loss.v_pred_like_loss and model.v_parameterization:
        yield Problem("--v_pred_like_loss", "cannot be combined with --v_parameterization: the loss is one already")


def _latent_caching_problems(options: OptionSet) -> Iterator[Problem]:
    caching, augment = options.get(CachingOptions), options.get(AugmentOptions)
    if caching is None or augment is None or not (caching.cache_latents or caching.cache_latents_to_disk):
        return
    for name in ("color_aug", "random_crop", "face_crop_aug_range"):
        if getattr(augment, name):
            yield Problem(f"--{name}", "cannot be combined with cached latents: the images would have to stay the same")


def text_caching_problems(options: OptionSet, *, trains_cached_encoders: bool = False) -> Iterator[Problem]:
    """What contradicts captions that are encoded once.

    Args:
        options: the parsed options.
        trains_cached_encoders: an encoder whose outputs would be cached is trained.
    """
    caching = options.get(TextCachingOptions)
    if caching is None or not caching.active:
        return
    flag = "--cache_text_encoder_outputs"
    if trains_cached_encoders:
        yield Problem(flag, "needs --network_train_unet_only: outputs of trained text encoders cannot be kept")
    captions = options.get(CaptionOptions)
    for name in ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate"):
        if captions is not None and getattr(captions, name) and not caching.cache_caption_variants:
            yield Problem(f"--{name}", f"needs --cache_caption_variants with {flag}: captions change at every visit")
    if captions is not None and captions.token_warmup_step:
        yield Problem("--token_warmup_step", f"cannot be combined with {flag}: captions grow while training")


def network_switch(options: OptionSet, name: str) -> bool:
    """Whether one of the `key=value` texts of --network_args switches something on, as networks spell it."""
    network = options.get(NetworkOptions)
    pairs = (text.partition("=") for text in (network.network_args if network else None) or ())
    return any(key == name and value.lower() in ("true", "1", "yes", "on") for key, _, value in pairs)
