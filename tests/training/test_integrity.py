import json

import pytest

from mor_jax.training.integrity import IntegrityError, check_manifest, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 5)
    (tmp_path / "inner" / "b.json").write_text("{}")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_an_untouched_folder_is_good(folder):
    assert verify_manifest(folder) == []
    check_manifest(folder)


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", "manifest.json"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_single_flipped_bit_is_found(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[place - 1 if name == "manifest.json" and place else place] ^= 1
    (folder / name).write_bytes(data)
    assert verify_manifest(folder) == [name]
    with pytest.raises(IntegrityError, match=name):
        check_manifest(folder)


def test_missing_new_and_cut_files_are_found(folder):
    (folder / "empty").unlink()
    (folder / "new").write_text("x")
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-1])
    assert verify_manifest(folder) == ["a.bin", "empty", "new"]


def test_a_forged_entry_without_the_own_hash_is_found(folder):
    body = json.loads((folder / "manifest.json").read_text())
    body["files"]["a.bin"]["size"] += 1
    (folder / "manifest.json").write_text(json.dumps(body))
    assert verify_manifest(folder) == ["manifest.json"]


def test_no_manifest_means_unfinished(tmp_path):
    (tmp_path / "a").write_text("x")
    assert verify_manifest(tmp_path) == ["manifest.json"]
