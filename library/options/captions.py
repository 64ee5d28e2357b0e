"""Options about captions."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, share
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Captions: how the text of an image is read and varied."""

    caption_extension: str = option(".caption", help="extension of caption files", aliases=("caption_extention",))
    caption_separator: str = option(",", help="what separates the tags of a caption")
    caption_prefix: str | None = option(None, help="text put before every caption")
    caption_suffix: str | None = option(None, help="text put after every caption")
    shuffle_caption: bool = option(False, help="shuffle the tags of a caption")
    keep_tokens: int = option(0, help="number of first tags that stay in place and are never dropped")
    keep_tokens_separator: str = option("", help="marks the kept head (and, used twice, the kept tail) of a caption")
    secondary_separator: str | None = option(None, help="joins tags that shuffle and drop as one")
    enable_wildcard: bool = option(False, help="{a|b} picks one; of several caption lines one is picked")
    caption_dropout_rate: float = option(0.0, help="share of captions replaced by nothing")
    caption_dropout_every_n_epochs: int = option(0, help="train every n-th epoch without captions")
    caption_tag_dropout_rate: float = option(0.0, help="share of tags that are left out")
    token_warmup_min: int = option(1, help="tags shown at the start of training")
    token_warmup_step: float = option(
        0, help="show more tags until this step, then all; a value below 1 is a share of all steps"
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from share(
            caption_dropout_rate=self.caption_dropout_rate, caption_tag_dropout_rate=self.caption_tag_dropout_rate
        )
        yield from at_least(
            0,
            keep_tokens=self.keep_tokens,
            caption_dropout_every_n_epochs=self.caption_dropout_every_n_epochs,
            token_warmup_step=self.token_warmup_step,
        )
