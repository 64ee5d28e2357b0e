"""Options that save memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, exclusive
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory: less of it for more time."""

    gradient_checkpointing: bool = option(False, help="compute activations again in the backward pass")
    cpu_offload_checkpointing: bool = option(False, help="move checkpointed activations to main memory")
    unsloth_offload_checkpointing: bool = option(False, help="move checkpointed activations while computing goes on")
    blocks_to_swap: int | None = option(None, help="keep the weights of this many frozen blocks in main memory")
    highvram: bool = option(False, help="do not free device memory between parts of the work")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, blocks_to_swap=self.blocks_to_swap)
        yield from exclusive(self, "cpu_offload_checkpointing", "unsloth_offload_checkpointing")
        for name in ("cpu_offload_checkpointing", "unsloth_offload_checkpointing"):
            yield from exclusive(self, name, "blocks_to_swap", "both move data between host and device")
            if getattr(self, name) and not self.gradient_checkpointing:
                yield Problem(f"--{name}", "needs --gradient_checkpointing")

    @property
    def offloads_activations(self) -> bool:
        """Whether the inputs of checkpointed blocks wait in main memory."""
        return self.cpu_offload_checkpointing or self.unsloth_offload_checkpointing


@dataclass(frozen=True, kw_only=True)
class VaeMemoryOptions:
    """VAE memory: encoding and decoding in parts."""

    vae_chunk_size: int | None = option(None, help="rows of an image that the VAE handles at a time")
    vae_disable_cache: bool = option(False, help="do not keep the VAE's features between chunks")
    qwen_image_vae_2d: bool = option(False, help="use the VAE's two-dimensional form: faster for single images")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, vae_chunk_size=self.vae_chunk_size)
