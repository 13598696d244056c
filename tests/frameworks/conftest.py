"""What must be set before a framework is imported."""

import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # it would report each run to a server, and wait for it
