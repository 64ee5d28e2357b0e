"""Make images without training, with the very parts that make the samples of a training."""

import io
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.base.dtypes import dtype_from_name
from library.base.errors import Problem, UserError, raise_problems
from library.base.lazy import resolve
from library.base.logs import logger
from library.base.text import PROMPT_OPTIONS, PromptOption, parse_prompt_line
from library.batch import Conditioning
from library.family import Family, InferenceSpec
from library.modules.attention import check_back_end, use_attention
from library.modules.components import Components, Need
from library.modules.loading import open_model_file
from library.modules.quantize import prepare_fp8, put_fp8
from library.options.attention import chosen_back_end, splits_attention
from library.options.inference import FORMATS, InferenceModelOptions, InferenceOptions, adapter_strength
from library.options.schema import OptionSet
from library.sampling.images import save_png, time_stamp
from library.sampling.progress import SampleProgress, say
from library.sampling.prompts import SampleDefaults, SampleRequest, make_request, prompt_notes
from library.sampling.runner import ImageModel
from library.strategy_base import Strategies
from library.training.conditioning import ConditioningSource
from library.training.network_adapter import import_network_module
from library.training.plan import autocast_context

# flags that every family has -> keys of prompt files
_PROMPT_KEYS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "steps": "sample_steps",
    "cfg_scale": "scale",
    "seed": "seed",
}
_STRENGTHS = "adapter_strengths"
_FP8_SKIP = ("wo",)  # transformers gives this layer of T5 inputs of the format of its weight
_THIRD_PARTY = "lycoris.kohya"  # reads the files that it wrote; no other name in a file is ever imported
_THIRD_PARTY_KEYS = (".hada_", ".lokr_")


@dataclass(frozen=True)
class Format:
    """Number format of a part: what it computes in, and whether its blocks keep their weights in 8 bits."""

    dtype: torch.dtype
    fp8: bool = False


@dataclass(frozen=True)
class Formats:
    """Number formats of all parts; text encoders in their order."""

    denoiser: Format
    vae: Format
    encoders: tuple[Format, ...]

    @classmethod
    def of(cls, spec: InferenceSpec, options: OptionSet, device: torch.device) -> "Formats":
        """Those of the options.

        Raises:
            UserError: the device cannot compute in one of them.
        """
        general = options[InferenceModelOptions].dtype
        problems = []

        def named(flag: str | None) -> Format:
            name = (options.value(flag) if flag else None) or general
            fp8 = FORMATS[name] == "fp8"
            dtype = dtype_from_name(FORMATS[general if fp8 else name])
            assert dtype is not None
            if dtype == torch.float16 and device.type == "cpu":
                problems.append(Problem("--dtype", "the CPU cannot compute in fp16; use bf16 or float32", name))
            return Format(dtype, fp8)

        found = cls(
            named(spec.denoiser_format), named(spec.vae_format), tuple(named(flag) for flag in spec.encoder_formats)
        )
        raise_problems(problems[:1])
        return found


@dataclass
class Studio:
    """A loaded model that makes images.

    Attributes:
        model: makes them.
        defaults: of the family's prompts.
        name: of the model file.
        networks: adapters whose strength can be changed, in the order of their files.
        strengths: what is asked for each.
        with_text: write the requests into the images.
    """

    model: ImageModel
    defaults: SampleDefaults
    name: str
    networks: list[Any] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)
    with_text: bool = True


def run_inference(family: Family, options: OptionSet, training: OptionSet) -> list[Path]:
    """Make the image of the options, or those of stdin.

    Args:
        family: with an `inference` record.
        options: of the script.
        training: options of training that say the same of the model.

    Returns:
        The files written.

    Raises:
        UserError: everything that is wrong with the files and can be known before weights load, or loading fails.
    """
    assert family.inference is not None
    wanted = options[InferenceOptions]
    adapters = _adapter_files(options[InferenceModelOptions])
    folder = _output_folder(wanted.output_dir)
    check_back_end(*chosen_back_end(training), trained=False)
    device = _device(_own(options, "device"))
    formats = Formats.of(family.inference, options, device)
    variant = resolve(family.inspect)(training)
    strategies: Strategies = resolve(family.strategies)(training, variant)
    if family.inference.tune is not None:
        resolve(family.inference.tune)(strategies.denoising, options)
    defaults = strategies.denoising.sample_defaults
    values = _prompt_values(family.inference, options, variant.name)
    given = {key: value for key, value in values.items() if key not in _untouched(family.inference, options)}
    request = make_request(0, values, defaults)
    message = defaults.sampler_problem(request.sampler) if request.sampler is not None else None
    if message is not None:
        raise UserError("--sample_sampler", request.sampler, message)
    source = _own(options, "from_file")
    several = wanted.interactive or source is not None
    if not several:
        for note in prompt_notes([given], [request], defaults):
            logger.warning("%s", note)
    studio = _load(family, options, training, strategies, formats, adapters, device)
    studio.with_text = not _own(options, "no_metadata")
    if not several:
        return [_write(studio, request, folder)]
    if source is None:
        return list(_answer(studio, values, folder, sys.stdin))
    return list(_answer(studio, values, folder, _prompt_lines(source)))


def _own(options: OptionSet, name: str) -> Any:
    """The value of a flag that not every family has."""
    return options.value(name) if name in options.offered else None


def _prompt_lines(path: str) -> io.StringIO:
    """The prompts of a file, without empty lines and those that begin with `#`.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError("--from_file", path, f"cannot be read: {error}") from error
    prompts = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError("--from_file", path, "holds no prompt")
    return io.StringIO("\n".join(prompts))


def _untouched(spec: InferenceSpec, options: OptionSet) -> set[str]:
    """Keys of prompts whose flags keep their defaults."""
    changed = options.changed()
    return {key for flag, key in {**_PROMPT_KEYS, **spec.prompt}.items() if flag not in changed} | {"flow_shift"}


def _prompt_values(spec: InferenceSpec, options: OptionSet, variant: str) -> dict[str, Any]:
    """What the flags say of the image, under the keys of prompt files."""
    flags = {**_PROMPT_KEYS, **spec.prompt}
    given = {key: options.value(flag) for flag, key in flags.items() if flag in options.offered}
    return {**spec.variants.get(variant, {}), **{key: value for key, value in given.items() if value is not None}}


def _adapter_files(options: InferenceModelOptions) -> list[tuple[str, float]]:
    """Files and strengths; the files are there."""
    found = []
    for text in options.lora_weights or ():
        path, strength = adapter_strength(text)
        open_model_file("--lora_weights", path)
        assert strength is not None
        found.append((path, strength))
    return found


def _output_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--output_dir", name, f"cannot be made: {error.strerror or error}") from error
    return folder


def _device(name: str | None = None) -> torch.device:
    """The named device, or the best one there is.

    Raises:
        UserError: it does not exist here.
    """
    if name is not None:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError("--device", name, "cannot be used here; leave it out, or use cuda or cpu") from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --- loading ----------------------------------------------------------------------------------------------------------


def _load(
    family: Family,
    options: OptionSet,
    training: OptionSet,
    strategies: Strategies,
    formats: Formats,
    adapters: Sequence[tuple[str, float]],
    device: torch.device,
) -> Studio:
    """The model with its adapters, ready to make images."""
    model = options[InferenceModelOptions]
    if model.offload and device.type == "cpu":
        logger.warning("--offload has no effect: there is no device besides main memory")
    home = torch.device("cpu") if model.offload else device
    components = _components(family, training, strategies, formats, home, streamed=not model.merge_lora_weights)
    strategies.tokenize.check_vocabularies(components.text_encoders)
    if model.merge_lora_weights:
        for path, strength in adapters:
            network, weights = _network(family, components, path, strength)
            weights = _chosen(weights, _own(options, "include_patterns"), _own(options, "exclude_patterns"))
            network.merge_to(_encoders(components), components.published_denoiser, weights, torch.float32, home)
            logger.info("merged %s with strength %g", path, strength)
    _quantize(components, strategies, formats)
    networks = [] if model.merge_lora_weights else [_install(family, components, *one, device) for one in adapters]
    use_attention(components.denoiser, chosen_back_end(training)[1], by_image=splits_attention(training))
    cpu = torch.device("cpu")
    text_places = (cpu, cpu) if _own(options, "text_encoder_cpu") else (device, home)
    for encoder in components.text_encoders:
        if encoder is not None:
            encoder.to(text_places[1])
    second = _own(options, "prompt2")
    return Studio(
        _image_model(strategies, components, formats, (device, home), text_places, second),
        strategies.denoising.sample_defaults,
        components.source.stem,
        networks,
        [strength for _, strength in adapters],
    )


def _components(
    family: Family,
    training: OptionSet,
    strategies: Strategies,
    formats: Formats,
    home: torch.device,
    *,
    streamed: bool,
) -> Components:
    """The loaded parts; with `streamed` an 8-bit denoiser is narrowed while it is read."""
    load, denoising = resolve(family.load), strategies.denoising
    narrow = None
    if formats.denoiser.fp8 and streamed:

        def narrow(module: nn.Module) -> None:
            prepare_fp8(denoising.blocks(module))

    need = Need(dtype=formats.denoiser.dtype, vae_dtype=formats.vae.dtype, device=home, prepare_denoiser=narrow)
    components: Components = load(training, replace(need, text_encoders=False))
    widest = formats.encoders[0].dtype
    for one in formats.encoders:
        widest = torch.promote_types(widest, one.dtype)
    texts = load(training, Need(denoiser=False, vae=False, dtype=widest, device=home))
    components.text_encoders = texts.text_encoders
    components.published_text_encoders = texts.published_text_encoders
    for encoder, one in zip(components.text_encoders, formats.encoders, strict=True):
        if encoder is not None:
            encoder.to(one.dtype)
    components.freeze()
    return components


def _quantize(components: Components, strategies: Strategies, formats: Formats) -> None:
    """Narrow what is to be kept in 8 bits and is not yet."""
    parts = [(components.denoiser, formats.denoiser, strategies.denoising.blocks, ())]
    for encoder, one in zip(components.text_encoders, formats.encoders, strict=True):
        parts.append((encoder, one, strategies.text_encoding.blocks, _FP8_SKIP))
    for module, one, blocks_of, skip in parts:
        if module is None or not one.fp8:
            continue
        blocks = blocks_of(module)
        wide = {id(layer) for block in blocks for layer in block.modules() if not hasattr(layer, "weight_scale")}
        prepare_fp8(blocks, skip=skip)
        for layer in (layer for block in blocks for layer in block.modules()):
            if id(layer) in wide and hasattr(layer, "weight_scale"):
                put_fp8(layer, layer.weight.data, layer.weight.device)


def _encoders(components: Components) -> Any:
    """Text encoders as network modules expect them: one as a module, several as a list."""
    encoders = components.published_text_encoders
    return encoders[0] if len(encoders) == 1 else list(encoders)


def _network(family: Family, components: Components, path: str, strength: float) -> tuple[Any, Mapping[str, Any]]:
    """The network of an adapter file, and the file's tensors."""
    file = open_model_file("--lora_weights", path)
    third_party = file.metadata.get("ss_network_module") == _THIRD_PARTY
    third_party |= any(mark in name for name in file.names for mark in _THIRD_PARTY_KEYS)
    module = import_network_module(_THIRD_PARTY if third_party else family.default_network or "")
    return module.create_network_from_weights(
        strength, path, components.vae, _encoders(components), components.published_denoiser, for_inference=True
    )


def _chosen(
    weights: Mapping[str, Any], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> Mapping[str, Any]:
    """The tensors in whose names one of `include` is found, if there are any, and none of `exclude`."""

    def found(patterns: Sequence[str] | None, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in patterns or ())

    return {
        name: tensor
        for name, tensor in weights.items()
        if (not include or found(include, name)) and not found(exclude, name)
    }


def _install(family: Family, components: Components, path: str, strength: float, device: torch.device) -> Any:
    """Let an adapter file act in the model's forward."""
    network, _ = _network(family, components, path, strength)
    network.apply_to(_encoders(components), components.published_denoiser, True, True)
    network.load_weights(path)
    network.to(device).requires_grad_(False).eval()
    logger.info("adapter %s with strength %g", path, strength)
    return network


def _image_model(
    strategies: Strategies,
    components: Components,
    formats: Formats,
    places: tuple[torch.device, torch.device],
    text_places: tuple[torch.device, torch.device],
    second: str | None,
) -> ImageModel:
    """What makes images of the loaded parts; each part comes to the device for its own work only.

    Args:
        strategies: of the family.
        components: the parts.
        formats: of the parts.
        places: where the model computes, and where it waits.
        text_places: the same of the text encoders.
        second: what text encoders after the first read instead of the prompt.
    """
    denoiser, encoders = components.denoiser, components.text_encoders
    device, home = places
    assert denoiser is not None and components.vae is not None

    @contextmanager
    def computing() -> Iterator[None]:
        with _lent([denoiser], device, home), autocast_context(device, formats.denoiser.dtype)():
            yield

    def condition(prompt: str, *, negative: bool = False) -> Conditioning:
        texts = [prompt if place == 0 or negative or second is None else second for place in range(len(encoders))]
        with _lent(encoders, *text_places):
            made = _condition(strategies, encoders, formats.encoders, text_places[0], texts, negative=negative)
            return made.to(device)

    return ImageModel(
        maker=strategies.denoising,
        denoiser=denoiser,
        vae=components.vae,
        condition=condition,
        device=device,
        autocast=computing,
    )


def _condition(
    strategies: Strategies,
    encoders: Sequence[nn.Module | None],
    formats: Sequence[Format],
    device: torch.device,
    texts: Sequence[str],
    *,
    negative: bool,
) -> Conditioning:
    """Conditioning of a text for each encoder; those of other formats or texts run one after the other."""
    found = None
    ways = [(one.dtype, text) for one, text in zip(formats, texts, strict=True)]
    for dtype, text in dict.fromkeys(ways):
        chosen = [encoder if way == (dtype, text) else None for encoder, way in zip(encoders, ways, strict=True)]
        idle = [False] * len(chosen)
        source = ConditioningSource(strategies, chosen, idle, None, device, autocast_context(device, dtype))
        one = source.for_prompt(text, negative=negative, beside=texts)
        found = one if found is None else found.merged(one)
    assert found is not None
    return found


@contextmanager
def _lent(modules: Sequence[nn.Module | None], device: torch.device, home: torch.device) -> Iterator[None]:
    """The modules are on the device inside, and at home again afterwards."""
    if home == device:
        yield
        return
    for module in modules:
        if module is not None:
            module.to(device)
    try:
        yield
    finally:
        for module in modules:
            if module is not None:
                module.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()


# --- making -----------------------------------------------------------------------------------------------------------


def _write(studio: Studio, request: SampleRequest, folder: Path) -> Path:
    """Make an image and write it to `<time>_<seed>.png`."""
    if request.seed is None:
        request = replace(request, seed=random.SystemRandom().randrange(2**32))
    with SampleProgress([request], "image") as progress:
        progress.begin(request)
        image = studio.model.make(request, progress.tick)
    start = f"{time_stamp()}_{request.seed}"
    path, number = folder / f"{start}.png", 1
    while path.exists():  # made within the same second
        number += 1
        path = folder / f"{start}_{number}.png"
    save_png(image, path, request, studio.name, with_text=studio.with_text)
    say("%s in %.1f s", path, progress.seconds)
    return path


def _interactive_options(studio: Studio) -> dict[str, PromptOption]:
    """Options of a line: what the family reads, `--c` for `--l`, and `--m` for the adapters' strengths."""
    read = {
        letters: option for letters, option in PROMPT_OPTIONS.items() if studio.defaults.why_unread(option.key) is None
    }
    strengths = PromptOption(_STRENGTHS, str, lambda text: _numbers(text) is not None, "numbers, as in 0.8,1")
    return {**read, "c": PROMPT_OPTIONS["l"], "m": strengths}


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None


def _answer(studio: Studio, values: Mapping[str, Any], folder: Path, lines: Any) -> Iterator[Path]:
    """An image for each line, until one is empty; a mistake is answered, never fatal.

    Args:
        studio: makes the images.
        values: of the flags; a line's options hold for that line.
        folder: of the images.
        lines: file of prompts with options.
    """
    options = _interactive_options(studio)
    known = " ".join(f"--{letters}" for letters in options)
    say("one prompt per line, with options (%s); an empty line ends", known)
    while line := lines.readline().strip():
        try:
            entry = parse_prompt_line(line, options)
            asked = entry.pop(_STRENGTHS, None)
            _set_strengths(studio, studio.strengths if asked is None else _numbers(asked), asked=asked is not None)
            _check_sampler(studio, entry.get("sample_sampler"))
            request = make_request(0, {**values, **entry}, studio.defaults)
        except ValueError as error:
            say("error: %s", error)
            continue
        for note in prompt_notes([entry], [request], studio.defaults):
            logger.warning("%s", note)
        yield _write(studio, request, folder)


def _check_sampler(studio: Studio, name: str | None) -> None:
    message = studio.defaults.sampler_problem(name) if name is not None else None
    if message is not None:
        raise ValueError(f"--ss {name}: {message}")


def _set_strengths(studio: Studio, strengths: Sequence[float] | None, *, asked: bool) -> None:
    """Give every adapter its strength.

    Raises:
        ValueError: there are not as many adapters, or none whose strength can change.
    """
    assert strengths is not None
    if not studio.networks:
        if asked:
            merged = " that is not merged into the weights" if studio.strengths else ""
            raise ValueError(f"--m: there is no adapter{merged}")
        return
    if len(strengths) != len(studio.networks):
        raise ValueError(f"--m: expected one number for each file of --lora_weights, {len(studio.networks)} in all")
    for network, strength in zip(studio.networks, strengths, strict=True):
        network.set_multiplier(strength)
