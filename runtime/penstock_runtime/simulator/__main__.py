"""`python -m penstock_runtime.simulator`: the planning commands without the `penstock` command."""

import sys

from penstock_runtime.simulator.cli import main

sys.exit(main())
