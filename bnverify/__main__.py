"""``python -m bnverify`` is the command line."""

import sys

from bnverify.cli import main

sys.exit(main())
