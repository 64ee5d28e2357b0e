"""Addressed randomness: a draw depends on what it is for, never on what was drawn before it.

An address is the blake2b hash of (seed, purpose, parts...). Each draw uses a generator of its own, seeded by its
address, on the CPU; so results do not depend on workers, prefetching, caches, device or the number of processes.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def address(seed: int, purpose: str, *parts: str | int) -> int:
    """A 63-bit number for (seed, purpose, parts)."""
    text = "\x1f".join([str(seed), purpose, *map(str, parts)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF


def python_random(seed: int, purpose: str, *parts: str | int) -> random.Random:
    """A private generator of the standard library for (seed, purpose, parts)."""
    return random.Random(address(seed, purpose, *parts))


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch for draws inside modules we do not own.

    The previous states come back on exit, so nothing outside can depend on how often a module drew.
    """
    import numpy
    import torch

    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
