"""Options of the scripts that make images without training."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option

# spellings of number formats -> the format; torch is not imported here
FORMATS = {
    **dict.fromkeys(("fp32", "float", "float32"), "float32"),
    **dict.fromkeys(("fp16", "half", "float16"), "float16"),
    **dict.fromkeys(("bf16", "bfloat", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp8", "fp8_e4m3fn", "e4m3fn", "float8_e4m3fn"), "fp8"),
}


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Image: what is made, and where it goes."""

    prompt: str = option("A photo of a cat", help="what the image shows")
    negative_prompt: str | None = option(None, help="what it does not show; acts with --cfg_scale other than 1")
    width: int = option(512, help="pixels; rounded down to what the model can make")
    height: int = option(512, help="pixels; rounded down to what the model can make")
    steps: int | None = option(None, help="denoising steps; the model's own number when not given")
    cfg_scale: float = option(1.0, help="classifier-free guidance; 1: none")
    seed: int | None = option(None, help="of the noise; a random one when not given")
    output_dir: str = option(".", help="folder of the images")
    interactive: bool = option(False, help="read prompts with options from stdin; an empty line ends it")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, width=self.width, height=self.height, steps=self.steps)
        yield from at_least(0, cfg_scale=self.cfg_scale, seed=self.seed)
        if self.seed is not None and self.seed >= 2**63:
            yield Problem("--seed", "must be below 2^63", self.seed)


@dataclass(frozen=True, kw_only=True)
class InferenceModelOptions:
    """Model: adapters, number formats, memory."""

    lora_weights: list[str] | None = option(None, help="adapter files, each with its strength: 'file;0.8'")
    merge_lora_weights: bool = option(False, help="add the adapters to the model's weights")
    dtype: str = option("bfloat16", help="number format of all parts without one of their own: float32, bf16, fp16")
    offload: bool = option(False, help="keep every part in main memory while it is not used")
    tokenizer_cache_dir: str | None = option(None, help="folder that keeps tokenizers for work without a network")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from format_problems(self, "dtype")
        for text in self.lora_weights or ():
            _, strength = adapter_strength(text)
            if strength is None:
                yield Problem("--lora_weights", "expected a file, or 'file;strength' with a number", text)


def format_problems(group: object, *names: str, weights_only: tuple[str, ...] = ()) -> Iterator[Problem]:
    """A problem for each value that names no number format; None passes.

    Args:
        group: an option group.
        names: of its fields that are computed in.
        weights_only: of its fields that may be 8-bit too, a format that weights are kept in.
    """
    for name in (*names, *weights_only):
        value = getattr(group, name)
        if value is None:
            continue
        if value not in FORMATS:
            yield Problem(f"--{name}", f"expected one of {', '.join(FORMATS)}", value)
        elif FORMATS[value] == "fp8" and name not in weights_only:
            yield Problem(f"--{name}", "only weights of denoiser and text encoders can be kept in 8 bits", value)


def adapter_strength(text: str) -> tuple[str, float | None]:
    """File and strength of `file;strength`; 1 where there is none, None where it is no number."""
    path, mark, strength = text.rpartition(";")
    if not mark:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        return path, None
