"""`python -m refengine`."""

import sys

from refengine.cli import main

sys.exit(main())
