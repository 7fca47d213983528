import sys

from forde_fast.cli import main

sys.exit(main())
