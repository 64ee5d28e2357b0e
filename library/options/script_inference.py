"""Flags of the scripts that make images of newer families, which call shared things by names of their own."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem
from library.base.logs import logger
from library.options.ranges import above, at_least
from library.options.schema import OptionSet, option

# shared flags -> what these scripts call them
NAMES = {
    "width": "image_size",
    "height": "image_size",
    "steps": "infer_steps",
    "cfg_scale": "guidance_scale",
    "output_dir": "save_path",
    "lora_weights": "lora_weight",
    "merge_lora_weights": "lora_weight",
}


@dataclass(frozen=True, kw_only=True)
class ScriptInferenceOptions:
    """Script: what is made, where it goes, adapters, memory."""

    image_size: list[int] | None = option(None, help="height and width in pixels")
    infer_steps: int = option(50, help="denoising steps")
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1: none")
    flow_shift: float = option(5.0, help="shift of the noise levels towards noise")
    save_path: str = option(help="folder of the images")
    from_file: str | None = option(None, help="file of prompts, one a line, with options")
    no_metadata: bool = option(False, help="write no prompt and settings into the images")
    output_type: str = option("images", help="what is written", choices=("images", "latent", "latent_images"))
    latent_path: list[str] | None = option(None, help="decode these files of latents instead of making an image")
    lora_weight: list[str] | None = option(None, help="adapter files, added to the model's weights")
    lora_multiplier: list[float] | None = option(None, help="their strengths; 1 for those without")
    include_patterns: list[str] | None = option(None, help="add only adapter keys in which one of these is found")
    exclude_patterns: list[str] | None = option(None, help="leave out adapter keys in which one of these is found")
    lycoris: bool = option(False, help="the adapters are LyCORIS files (they are recognised)")
    fp8: bool = option(False, help="keep the blocks of the transformer in 8 bits, with a scale for each output")
    fp8_scaled: bool = option(False, help="the same as --fp8")
    text_encoder_cpu: bool = option(False, help="run the text encoder on the CPU")
    device: str | None = option(None, help="where the model computes; the best device there is when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, infer_steps=self.infer_steps)
        yield from at_least(0, guidance_scale=self.guidance_scale)
        yield from above(0, flow_shift=self.flow_shift)
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            yield Problem("--image_size", "expected two numbers: height and width in pixels", self.image_size)
        if len(self.lora_multiplier or ()) > len(self.lora_weight or ()):
            yield Problem("--lora_multiplier", "has more numbers than --lora_weight has files", self.lora_multiplier)
        if self.output_type != "images":
            message = "latents are not written in this version yet; leave it out, and images are written"
            yield Problem("--output_type", message, self.output_type)
        if self.latent_path:
            yield Problem("--latent_path", "files of latents are not read in this version yet; leave it out")


def shared_values(options: OptionSet) -> Mapping[str, Any]:
    """What the flags of `ScriptInferenceOptions` say, under the names of the shared ones."""
    own = options[ScriptInferenceOptions]
    height, width = own.image_size or (1024, 1024)
    strengths = [*(own.lora_multiplier or ())]
    strengths += [1.0] * (len(own.lora_weight or ()) - len(strengths))
    if own.lycoris:
        logger.warning("--lycoris has no effect: files of LyCORIS are recognised by their keys")
    return {
        "width": width,
        "height": height,
        "steps": own.infer_steps,
        "cfg_scale": own.guidance_scale,
        "output_dir": own.save_path,
        "lora_weights": [f"{file};{strength}" for file, strength in zip(own.lora_weight or (), strengths, strict=True)],
        "merge_lora_weights": bool(own.lora_weight),
    }
