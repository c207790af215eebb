"""``python -m wsiengine``."""

import sys

from wsiengine.cli import main

sys.exit(main())
