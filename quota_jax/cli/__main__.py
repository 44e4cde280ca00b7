"""``python -m quota_jax.cli``."""

import sys

from quota_jax.cli import main

sys.exit(main())
