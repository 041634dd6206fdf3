"""Shapes in signatures are checked while the tests run; Ray is started once."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("vqvae_core", "beartype.beartype")

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
SHARED_DATA = Path(os.environ.get("VQVAE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and frames, where they lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}; set VQVAE_SHARED_DATA to a folder that has it")
    return SHARED_DATA
