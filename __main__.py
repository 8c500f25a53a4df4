"""``python -m stratagem``: the console command ``stratagem``."""

import sys

from .framework.command_line import main

if __name__ == "__main__":
    sys.exit(main())
