"""From loaded components to data that can be read: caches, and who gives latents and conditioning."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from library.batch import Conditioning
from library.caching.latents import all_items
from library.caching.text_outputs import cache_text_outputs
from library.data.dataset import LatentReader, TextReader, TrainDataset
from library.modules.components import Components
from library.options.caching import CachingOptions, TextCachingOptions
from library.training.caches import DiskCaches, keeps_texts_on_disk, memory_latents
from library.training.conditioning import ConditioningSource, encode_with_all
from library.training.latents import LatentEncoder, LatentSource
from library.training.replay import Replay
from library.training.setting import Autocast, Setting


@dataclass(frozen=True)
class Readable:
    """Data that is ready to be read: what is cached is cached.

    Attributes:
        train: images to train on.
        validation: images to validate on.
        latents: gives the latents of their batches.
        texts: conditioning of single captions, or None where encoders stay.
        prompts: the same of the prompts of sample images, and of negative ones (True).
    """

    train: TrainDataset
    validation: TrainDataset
    latents: LatentSource
    texts: Mapping[str, Conditioning] | None
    prompts: Mapping[tuple[str, bool], Conditioning] | None


def make_disk_caches(setting: Setting) -> DiskCaches | None:
    """Look at the caches on disk, if the run keeps any."""
    plan, options = setting.plan, setting.plan.options
    latents = options[CachingOptions].cache_latents_to_disk
    texts = keeps_texts_on_disk(options)
    if not latents and not texts:
        return None
    return DiskCaches(setting.caches(), plan.dataset(), plan.dataset(validation=True), latents=latents, texts=texts)


def fill_caches(
    setting: Setting,
    components: Components,
    caches: DiskCaches | None,
    autocast: Autocast,
    replay: Replay | None,
) -> Readable:
    """Encode images and captions where they are cached; nothing is trained yet, so no adapter has a part in it."""
    plan = setting.plan
    caching = plan.options[CachingOptions]
    encoder = None
    if components.vae is not None:
        encoder = LatentEncoder.for_run(setting.strategies, components.vae, caching, plan.seed)
    latents: list[LatentReader | None] = [None, None]
    texts: list[TextReader | None] = [None, None]
    if caches is not None:
        caches.fill_latents(encoder)
        encode = encode_with_all(setting.strategies, components.text_encoders, setting.device, autocast)
        caches.fill_texts(encode if components.has_text_encoders else None, text_batch_size(setting))
        latents, texts = map(list, zip(*caches.readers()))
    if plan.cache_latents and latents[0] is None and replay is None:
        assert encoder is not None
        datasets = plan.dataset(), plan.dataset(validation=True)
        latents = list(memory_latents(setting.caches(), datasets, encoder))
    if plan.cache_latents or replay is not None:
        encoder = None
        if components.vae is not None:
            components.vae.to("cpu")
        if not setting.inspected.requests:
            components.vae = None
    return Readable(
        plan.dataset(latents=latents[0], texts=texts[0]),
        plan.dataset(validation=True, latents=latents[1], texts=texts[1]),
        LatentSource(encoder),
        _texts_in_memory(setting, components, autocast, replay, on_disk=texts[0] is not None),
        _prompts_in_memory(setting, components, autocast),
    )


def text_batch_size(setting: Setting) -> int:
    """Captions per call of the text encoders."""
    text = setting.plan.options.get(TextCachingOptions)
    given = text.text_encoder_batch_size if text is not None else None
    return given or setting.plan.images.train[0].plan.batch_size


def _texts_in_memory(
    setting: Setting, components: Components, autocast: Autocast, replay: Replay | None, *, on_disk: bool
) -> Mapping[str, Conditioning] | None:
    """Conditioning of captions; empty where files hold them."""
    if not setting.plan.cache_text:
        return None
    texts: list[str] = []
    if not on_disk:
        dataset, held_out = setting.plan.dataset(), setting.plan.dataset(validation=True)
        # a replay trains on the captions of its record, whatever the files say now
        texts = replay.captions() if replay is not None else _captions(dataset)
        texts += _captions(held_out)
    return cache_text_outputs(
        texts,
        encode_with_all(setting.strategies, components.text_encoders, setting.device, autocast),
        batch_size=text_batch_size(setting),
        show_progress=setting.processes.is_main,
    )


def _prompts_in_memory(
    setting: Setting, components: Components, autocast: Autocast
) -> Mapping[tuple[str, bool], Conditioning] | None:
    """Conditioning of sample prompts, where text encoders leave after caching."""
    if not setting.plan.cache_text or not setting.inspected.requests:
        return None
    encoders = components.text_encoders
    source = ConditioningSource(setting.strategies, encoders, [False] * len(encoders), None, setting.device, autocast)
    requests = setting.inspected.requests
    texts = {(request.prompt, False) for request in requests} | {(request.negative, True) for request in requests}
    home = torch.device("cpu")
    return {(text, negative): source.for_prompt(text, negative=negative).to(home) for text, negative in sorted(texts)}


def _captions(data: TrainDataset) -> list[str]:
    """Every text that an image may get when texts are cached."""
    return [text for item in all_items(data) for text in data.texts(item)]


def make_conditioning(
    setting: Setting,
    components: Components,
    trained: list[bool],
    autocast: Autocast,
    readable: Readable,
) -> ConditioningSource:
    """Text conditioning; encoders that are not needed any more are let go."""
    encoders = components.text_encoders
    if readable.texts is not None:
        for index, on in enumerate(trained):
            if not on:
                encoders[index] = components.published_text_encoders[index] = None
    return ConditioningSource(
        setting.strategies, encoders, trained, readable.texts, setting.device, autocast, readable.prompts
    )
