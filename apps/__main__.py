"""`python -m apps` is the `polyhead` command."""

import sys

from apps.main import main

sys.exit(main())
