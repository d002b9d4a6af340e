"""python -m diffusion_ext"""

import sys

from .app.cli import main

sys.exit(main())
