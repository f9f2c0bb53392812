"""The notebook runs from its first cell to its last, as it is committed."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "exercises" / "one_step.ipynb"


def test_opened_alone_it_says_what_is_missing(tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", first], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("clipo.py is not here; open this notebook inside")
    assert done.stderr.count("\n") == 1


def test_one_step_under_the_microscope():
    needs = "nbformat", "nbclient", "ipykernel"
    nbformat, nbclient, _ = (pytest.importorskip(name, reason="not installed (lab/requirements.txt)") for name in needs)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert sum(pictures) == 2  # a reader on the web sees them
    for cell in code:
        cell.outputs, source = [], cell.source
        cell.source = source.replace("batches=200", "batches=100")  # a worse model does, and half a minute is saved
    folder = {"metadata": {"path": str(ROOT / "exercises")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    assert [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code] == pictures
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "by hand" in printed and "nan" not in printed
