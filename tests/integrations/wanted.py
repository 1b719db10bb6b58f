"""Peers that a test module needs."""

from importlib import metadata

import pytest


def require(name, version):
    """Skips the module, saying what was wanted and found, unless the peer is installed in that version."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = "none"
    if found.split(".")[: version.count(".") + 1] != version.split("."):
        pytest.skip(f"wanted {name} {version}.*, found {found}", allow_module_level=True)
