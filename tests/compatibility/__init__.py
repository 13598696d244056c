"""Two matrices, of adapters and of backbones: each case is exact, refused with a sentence, or not buildable here.

    make compatibility        # all cases, each in a process of its own, written to docs/compatibility.md

A case is *exact* when everything in :func:`compatibility.check.check` holds against an untouched copy of the base. A
case that is neither exact nor refused is *wrong*, and the command fails.
"""
