"""For ms-swift: --external_plugins examples/swift_plugin.py --callbacks tmkl"""

import mask_the_target.integrations.swift  # noqa: F401
