"""Make an image with Stable Diffusion XL."""

import argparse

from library.inference import main, make_inference_parser


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_inference_parser("sdxl")


if __name__ == "__main__":
    main("sdxl")
