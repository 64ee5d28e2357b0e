"""Options about the files that training writes."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """Saving: what is written, where and how often."""

    output_dir: str | None = option(None, help="folder of the results")
    output_name: str | None = option(None, help="name of the results, without extension")
    save_precision: str | None = option(
        None, help="number format of saved weights; unchanged when not given", choices=("float", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = option(None, help="save after every n-th epoch")
    save_every_n_steps: int | None = option(None, help="save after every n-th step")
    save_n_epoch_ratio: int | None = option(None, help="save at least this many times, evenly over the epochs")
    save_last_n_epochs: int | None = option(None, help="keep the saves of the last n epochs only")
    save_last_n_steps: int | None = option(None, help="keep the saves of the last n steps only")
    save_model_as: str | None = option("safetensors", help="file format", choices=("ckpt", "pt", "safetensors"))
    use_safetensors: bool = option(False, help="prefer safetensors over ckpt when the format is not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1,
            save_every_n_epochs=self.save_every_n_epochs,
            save_every_n_steps=self.save_every_n_steps,
            save_n_epoch_ratio=self.save_n_epoch_ratio,
            save_last_n_epochs=self.save_last_n_epochs,
            save_last_n_steps=self.save_last_n_steps,
        )
