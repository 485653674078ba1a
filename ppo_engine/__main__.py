"""`python -m ppo_engine` is `ppo-engine`."""

import sys

from ppo_engine.cli import main

sys.exit(main())
