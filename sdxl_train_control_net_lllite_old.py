"""Old name of sdxl_train_control_net_lllite.py."""

from library.train_util import main
from sdxl_train_control_net_lllite import FAMILY, TASK, setup_parser

__all__ = ["FAMILY", "TASK", "setup_parser"]

if __name__ == "__main__":
    main(FAMILY, TASK, renamed_to="sdxl_train_control_net_lllite.py")
