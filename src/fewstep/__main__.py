"""`python -m fewstep` is the command line."""

import sys

from fewstep.cli.main import main

sys.exit(main())
