"""Options about number formats."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision: number formats of models and arithmetic."""

    mixed_precision: str = option("no", help="format of the computation", choices=("no", "fp16", "bf16"))
    full_fp16: bool = option(False, help="keep weights and gradients in float16 too")
    full_bf16: bool = option(False, help="keep weights and gradients in bfloat16 too")
    bf16_update: str | None = option(
        None,
        help="how weights trained in bfloat16 take up small changes: rounded by chance, or with the rest kept",
        choices=("stochastic", "kahan"),
    )
    fp8_base: bool = option(False, help="keep the frozen base model in 8-bit floats")
    fp8_base_unet: bool = option(False, help="keep the frozen denoiser in 8-bit floats, the text encoders not")
    cuda_allow_tf32: bool = option(False, help="let the GPU round float32 products to TF32: faster, less exact")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN try its algorithms and keep the fastest")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.full_fp16 and self.mixed_precision != "fp16":
            yield Problem("--full_fp16", "needs --mixed_precision fp16")
        if self.full_bf16 and self.mixed_precision != "bf16":
            yield Problem("--full_bf16", "needs --mixed_precision bf16")
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(self, name) and self.mixed_precision == "no":
                yield Problem(f"--{name}", "needs --mixed_precision fp16 or bf16")
