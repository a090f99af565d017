"""The hook that lets no oracle be skipped in CI, tried in a pytest of its own."""

import pathlib
import subprocess
import sys

import pytest

CONFTEST = pathlib.Path(__file__).parents[1] / "conftest.py"
MODULE_SKIP = "import pytest\npytest.importorskip('no_such_library')\ndef test_one(): pass\n"
TEST_SKIP = "import pytest\ndef test_one(): pytest.skip('{reason}')\n"
MARK_SKIP = "import pytest\n@pytest.mark.skipif(True, reason='{reason}')\ndef test_one(): pass\n"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_one(): assert False\n"


@pytest.mark.parametrize(
    ("source", "required", "fails"),
    [
        (MODULE_SKIP, "1", True),
        (TEST_SKIP.format(reason="torch is missing"), "1", True),
        (MARK_SKIP.format(reason="torch is missing"), "1", True),
        (MARK_SKIP.format(reason="needs a GPU"), "1", False),
        (EXPECTED_FAILURE, "1", False),
        (TEST_SKIP.format(reason="torch is missing"), "0", False),
    ],
)
def test_a_skipped_oracle_fails_where_all_are_required(tmp_path, monkeypatch, source, required, fails):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_one.py").write_text(source + "\n\ndef test_other(): pass\n" * ("importorskip" not in source))
    monkeypatch.setenv("MOR_REQUIRE_ORACLES", required)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
