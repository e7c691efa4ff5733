"""python -m tunetrail …"""

import sys

from tunetrail.cli import main

sys.exit(main())
