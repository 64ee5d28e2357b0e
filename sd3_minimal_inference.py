"""Make an image with Stable Diffusion 3 and 3.5."""

import argparse

from library.inference import main, make_inference_parser


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_inference_parser("sd3")


if __name__ == "__main__":
    main("sd3")
