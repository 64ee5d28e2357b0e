"""Fill the caches of a dataset without training."""

from dataclasses import dataclass

from library.base.errors import raise_problems
from library.base.lazy import resolve
from library.base.logs import logger
from library.data.dataset import TrainDataset
from library.family import Family
from library.modules.components import Components, Need
from library.options.caching import TextCachingOptions
from library.options.distributed import DistributedOptions
from library.options.precision import PrecisionOptions
from library.options.schedule import LengthOptions
from library.options.schema import OptionSet
from library.training.caches import CacheSetting, DiskCaches
from library.training.checks import Inspected, inspect_data
from library.training.conditioning import encode_with_all
from library.training.distributed import start_processes
from library.training.latents import LatentEncoder
from library.training.plan import autocast_context, preparations, read_settings, weight_dtypes
from library.training.report import dataset_rows, table


@dataclass(frozen=True)
class CacheResult:
    """What a caching run found and left.

    Attributes:
        latents: cache files of latents there are now.
        texts: cache files of text encoder outputs there are now.
        made: of these, how many were made by all processes.
    """

    latents: int
    texts: int
    made: int


def run_caching(family: Family, options: OptionSet, *, latents: bool, texts: bool) -> CacheResult:
    """Look at the images, then encode what has no cache yet.

    Args:
        family: of the model.
        options: of the run; those of what is kept on disk are on.
        latents: keep latents on disk.
        texts: keep text encoder outputs on disk.

    Raises:
        UserError: everything that is wrong and can be known before weights load, or a failure that has a remedy.
    """
    processes = start_processes(
        options[PrecisionOptions].mixed_precision, timeout=options[DistributedOptions].ddp_timeout
    )
    seed = options[LengthOptions].seed or 0
    inspected, problems = inspect_data(family, options, seed, is_main=processes.is_main)
    raise_problems(problems)
    assert inspected is not None
    if processes.is_main:
        logger.info("%s", table("caching", dataset_rows(inspected.images)))
    settings = read_settings(options, seed=seed, max_steps=0, with_images=True)
    train, validation = (TrainDataset(s, settings) for s in (inspected.images.train, inspected.images.validation))
    setting = CacheSetting(
        family=family, options=options, strategies=inspected.strategies, processes=processes, seed=seed
    )
    caches = DiskCaches(setting, train, validation, latents=latents, texts=texts)
    made = caches.num_pending
    components = _load(setting, inspected, caches)
    _fill(setting, caches, components, train.sets[0].plan.batch_size)
    caches.readers()  # says what is still missing
    count = sum(len(files.requests) for files in caches.latents or ())
    result = CacheResult(count, len(caches.texts.requests) if caches.texts else 0, made)
    if processes.is_main:
        logger.info("caches complete: %d of latents, %d of texts, %d of them new", count, result.texts, made)
    return result


def _load(setting: CacheSetting, inspected: Inspected, caches: DiskCaches) -> Components | None:
    """The parts of the model that are needed; none when nothing is missing."""
    if not caches.num_pending:
        return None
    dtype, vae_dtype = weight_dtypes(setting.options)
    need = Need(
        denoiser=False,
        vae=caches.lacks_latents,
        text_encoders=caches.lacks_texts,
        dtype=dtype,
        vae_dtype=vae_dtype,
        device=setting.processes.device,
        **preparations(setting.options, setting.strategies),
    )
    components: Components = resolve(setting.family.load)(setting.options, need)
    components.freeze()
    if need.text_encoders:
        inspected.strategies.tokenize.check_vocabularies(components.text_encoders)
    return components


def _fill(setting: CacheSetting, caches: DiskCaches, components: Components | None, batch_size: int) -> None:
    strategies, caching = setting.strategies, setting.caching
    vae = components.vae if components is not None else None
    caches.fill_latents(None if vae is None else LatentEncoder.for_run(strategies, vae, caching, setting.seed))
    encode = None
    if components is not None and components.has_text_encoders:
        device = setting.processes.device
        autocast = autocast_context(device, weight_dtypes(setting.options)[0])
        encode = encode_with_all(strategies, components.text_encoders, device, autocast)
    given = setting.options[TextCachingOptions].text_encoder_batch_size if caches.texts else None
    caches.fill_texts(encode, given or batch_size)
