"""Options of textual inversion."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, exclusive
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """Textual inversion: the new word."""

    token_string: str | None = option(None, help="the word to learn; must not be a word of the tokenizer")
    init_word: str | None = option(None, help="words whose vectors the new ones start from")
    num_vectors_per_token: int = option(1, help="vectors of the new word")
    weights: str | None = option(None, help="embedding file to start from")
    use_object_template: bool = option(False, help="make captions from templates for objects")
    use_style_template: bool = option(False, help="make captions from templates for styles")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, num_vectors_per_token=self.num_vectors_per_token)
        yield from exclusive(self, "use_object_template", "use_style_template")
