"""Weights in parts that can be carried, and whole again."""

import pytest

from border import UserError
from lab import smollm


@pytest.mark.parametrize("size, parts", [(1, 1), (10, 1), (11, 2), (30, 3)])
def test_joined_it_is_the_same_file(tmp_path, size, parts):
    file, whole = tmp_path / "weights.gguf", tmp_path / "whole"
    file.write_bytes(bytes(range(size)))
    whole.mkdir()
    smollm.split(file, tmp_path / "parts", most=10)
    assert len(list((tmp_path / "parts").glob("part-*"))) == parts
    assert all(part.stat().st_size <= 10 for part in (tmp_path / "parts").glob("part-*"))
    joined = smollm.join(tmp_path / "parts", whole)
    assert joined == whole / "weights.gguf" and joined.read_bytes() == file.read_bytes()


def test_a_part_that_is_missing_or_another_is_named(tmp_path, capsys):
    file, parts = tmp_path / "weights.gguf", tmp_path / "parts"
    file.write_bytes(bytes(25))
    smollm.split(file, parts, most=10)
    with pytest.raises(UserError, match="parts exists; expected a folder that does not"):
        smollm.split(file, parts)
    (parts / "part-1").write_bytes(b"x" * 10)
    assert smollm.main(["--join", str(parts), str(tmp_path / "model")]) == 2
    assert "parts holds other bytes than --split wrote" in capsys.readouterr().err
    (parts / "part-1").unlink()
    with pytest.raises(UserError, match=r"parts is not whole \(.*part-1.*\); expected what --split wrote"):
        smollm.join(parts, tmp_path)
    (parts / "parts.json").write_text("{}")
    with pytest.raises(UserError, match=r"parts\.json"):
        smollm.join(parts, tmp_path)
    assert not (tmp_path / "model").exists()
