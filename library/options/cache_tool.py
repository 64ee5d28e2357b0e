"""Options of the tools that fill caches."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class CacheToolOptions:
    """Caching: which model the caches are for."""

    family: str | None = option(
        None, help="model family: sd, sdxl, sd3, flux, lumina, hunyuan_image, anima; sd when not given", toml=False
    )
    sdxl: bool = option(False, help="the same as --family sdxl", toml=False)
    flux: bool = option(False, help="the same as --family flux", toml=False)
    skip_existing: bool = option(False, help="trust existing files without opening them", toml=False)
    t5xxl_dtype: str | None = option(None, help="no effect: encoders compute in --mixed_precision", toml=False)

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        named = {name for name, on in (("sdxl", self.sdxl), ("flux", self.flux)) if on}
        if self.family is not None:
            named.add(self.family)
        if len(named) > 1:
            yield Problem("--family", f"only one model family can be named, not {' and '.join(sorted(named))}")

    @property
    def name(self) -> str:
        """Name of the family."""
        return self.family or ("sdxl" if self.sdxl else "flux" if self.flux else "sd")
