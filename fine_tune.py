"""Train Stable Diffusion 1.x or 2.x on captioned images."""

import argparse

from library.train_util import main, make_parser

FAMILY, TASK, PRESET = "sd", "full", "finetune"


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_parser(FAMILY, TASK, PRESET)


if __name__ == "__main__":
    main(FAMILY, TASK, PRESET)
