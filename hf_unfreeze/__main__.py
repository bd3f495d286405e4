"""``python -m hf_unfreeze`` is ``hf-unfreeze``."""

import sys

from .cli import main

sys.exit(main())
