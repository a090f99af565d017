"""The package's face: light to import, and every public name is there."""

import subprocess
import sys

import mor_jax


def test_importing_the_package_imports_no_jax():
    code = "import sys, mor_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_loads():
    for name in mor_jax.__all__:
        assert getattr(mor_jax, name) is not None
    assert set(mor_jax.__all__) == {name for names in mor_jax._ROOMS.values() for name in names}
