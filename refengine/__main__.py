"""`python -m refengine`."""

import sys

from refengine.cli.main import main

sys.exit(main())
