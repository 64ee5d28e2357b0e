"""Options about compiling the model."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, exclusive
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Compiling: faster steps after a slow start."""

    torch_compile: bool = option(False, help="compile the whole model; --compile does it block by block")
    dynamo_backend: str = option(
        "inductor",
        help="backend of --torch_compile",
        choices=(
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "ipex",
            "tvm",
        ),
    )
    compile: bool = option(False, help="compile each kind of block of the denoiser once")
    compile_backend: str = option("inductor", help="backend of --compile")
    compile_mode: str = option(
        "default",
        help="how hard the compiler tries",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    compile_dynamic: str | None = option(
        None,
        help="one graph for all sizes (true), one per size (false), or decide while running (auto)",
        choices=("true", "false", "auto"),
    )
    compile_fullgraph: bool = option(False, help="fail when a block does not compile as one graph")
    compile_cache_size_limit: int | None = option(None, help="graphs kept per block before giving up")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from exclusive(self, "compile", "torch_compile")
        yield from at_least(1, compile_cache_size_limit=self.compile_cache_size_limit)
