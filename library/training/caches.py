"""Caches of a run: what is there before the model loads, what has to be made after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.logs import logger
from library.caching.files import sweep_leftovers
from library.caching.fingerprints import digest
from library.caching.latent_files import LatentLayout
from library.caching.latents import Encoder, LatentFiles, MemoryLatents, all_items, cache_in_memory
from library.caching.text_files import TextLayout
from library.caching.text_outputs import Encode, TextFiles
from library.data.dataset import LatentReader, TextReader, TrainDataset
from library.family import Family
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.schema import OptionSet
from library.strategy_base import Strategies
from library.training.distributed import Processes, process_is_alive


@dataclass(frozen=True, kw_only=True)
class CacheSetting:
    """What decides how caches are named and made.

    Attributes:
        family: of the model.
        options: of the run.
        strategies: of the family.
        processes: who shares the work.
        seed: of the run, for sampled latents.
    """

    family: Family
    options: OptionSet
    strategies: Strategies
    processes: Processes
    seed: int

    @property
    def caching(self) -> CachingOptions:
        """Flags of the caches."""
        return self.options[CachingOptions]

    def identity(self, part: str) -> str:
        """A text that stands for the weights of "vae" or "text"."""
        return resolve(self.family.identities)(self.options)[part]


class DiskCaches:
    """The caches on disk of the datasets of a run; those that are not kept on disk are None.

    Args:
        setting: how they are made.
        train: images to train on.
        validation: images to validate on.
        latents: whether latents are kept on disk.
        texts: whether text encoder outputs are.
    """

    def __init__(
        self, setting: CacheSetting, train: TrainDataset, validation: TrainDataset, *, latents: bool, texts: bool
    ) -> None:
        self.setting = setting
        self.datasets = (train, validation)
        self.latents = [self._latent_files(dataset) for dataset in self.datasets] if latents else None
        self.texts = self._text_files() if texts else None
        if setting.processes.is_main and (latents or texts):
            self._sweep()
        self._survey()

    def _latent_files(self, dataset: TrainDataset) -> LatentFiles:
        spec, caching = self.setting.family.latent, self.setting.caching
        layout = LatentLayout(
            suffix=spec.cache_suffix,
            channels=spec.channels,
            unsized=spec.unsized_caches,
            format=caching.cache_format,
        )
        kind = ("sample", self.setting.seed) if caching.vae_sample else ("mode",)
        return LatentFiles(dataset, layout, spec.spatial_factor, (self.setting.identity("vae"), *kind))

    def _text_files(self) -> TextFiles:
        setting, spec = self.setting, self.setting.family.text
        if spec is None:
            message = f"no program keeps such files for {setting.family.title}; --cache_text_encoder_outputs keeps "
            raise UserError("--cache_text_encoder_outputs_to_disk", message=message + "them in memory")
        packer = setting.strategies.text_outputs_caching
        layout = TextLayout(
            suffix=spec.cache_suffix, arrays=spec.arrays, flags=packer.flags, format=setting.caching.cache_format
        )
        recipe = digest(setting.identity("text"), *packer.settings, *_base_weights(setting.options))
        return TextFiles(self.datasets, layout, packer, recipe)

    def _sweep(self) -> None:
        """Files that a killed run left half written."""
        folders = {
            Path(dataset.record(item).cache_base).parent for dataset in self.datasets for item in all_items(dataset)
        }
        count = sum(sweep_leftovers(folder, process_is_alive) for folder in folders)
        if count:
            logger.info("removed %d half-written cache files of runs that were stopped", count)

    def _all(self) -> list[tuple[str, LatentFiles | TextFiles]]:
        latents = [] if self.latents is None else list(zip(("latents", "validation latents"), self.latents))
        return [*latents, *([] if self.texts is None else [("text encoder outputs", self.texts)])]

    def _survey(self) -> None:
        caching = self.setting.caching
        for name, files in self._all():
            if not files.requests:
                continue
            files.survey(
                trust=caching.skip_cache_check,
                verify=caching.verify_caches,
                show_progress=self.setting.processes.is_main,
            )
            if self.setting.processes.is_main:
                logger.info("caches of %s: %s", name, files.report())

    @property
    def lacks_latents(self) -> bool:
        """Whether the autoencoder is needed to complete them."""
        return self.latents is not None and any(files.pending() for files in self.latents)

    @property
    def lacks_texts(self) -> bool:
        """Whether text encoders are needed to complete them."""
        return self.texts is not None and bool(self.texts.pending())

    @property
    def num_pending(self) -> int:
        """Files that have to be made or completed."""
        return sum(len(files.pending()) for _, files in self._all())

    def fill_latents(self, encoder: Encoder | None) -> None:
        """Make what is missing; every process its share.

        Args:
            encoder: of images; None when nothing is missing.
        """
        processes = self.setting.processes
        for files in self.latents or ():
            if encoder is not None and files.pending():
                files.fill(
                    encoder,
                    batch_size=self.setting.caching.vae_batch_size,
                    rank=processes.rank,
                    world_size=processes.world_size,
                    show_progress=processes.is_main,
                )
            # before the next: it may add to the same files
            processes.wait_for_all()
            files.survey(show_progress=False)

    def fill_texts(self, encode: Encode | None, batch_size: int) -> None:
        """Make what is missing; every process its share.

        Args:
            encode: texts -> conditioning; None when nothing is missing.
            batch_size: captions per call.
        """
        processes = self.setting.processes
        if self.texts is None:
            return
        if encode is not None and self.texts.pending():
            self.texts.fill(
                encode,
                batch_size=batch_size,
                rank=processes.rank,
                world_size=processes.world_size,
                show_progress=processes.is_main,
            )
        processes.wait_for_all()
        self.texts.survey(show_progress=False)

    def readers(self) -> list[tuple[LatentReader | None, TextReader | None]]:
        """(latents, texts) for training and for validation."""
        return [
            (
                None if self.latents is None else self.latents[number].reader(),
                None if self.texts is None else self.texts.reader(dataset),
            )
            for number, dataset in enumerate(self.datasets)
        ]


def _base_weights(options: OptionSet) -> Sequence[object]:
    """Adapters that are merged into text encoders change what these give."""
    values: Mapping[str, Any] = options.values()
    files = values.get("base_weights") or []
    return [(Path(file).name, Path(file).stat().st_size) for file in files] + [values.get("base_weights_multiplier")]


def memory_latents(setting: CacheSetting, datasets: Sequence[TrainDataset], encoder: Encoder) -> list[MemoryLatents]:
    """Latents of several datasets in memory; every process holds all of them."""
    return [
        cache_in_memory(
            TrainDataset(dataset.sets, replace(dataset.settings, latents=None)),
            encoder,
            batch_size=setting.caching.vae_batch_size,
            show_progress=setting.processes.is_main,
        )
        for dataset in datasets
    ]


def keeps_texts_on_disk(options: OptionSet) -> bool:
    """Whether text encoder outputs are kept in files."""
    text = options.get(TextCachingOptions)
    return text is not None and text.cache_text_encoder_outputs_to_disk
