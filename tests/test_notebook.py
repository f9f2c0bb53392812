"""The notebook runs from its first cell to its last, as it is committed."""

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed (lab/requirements.txt)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (lab/requirements.txt)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (lab/requirements.txt)")


def test_one_step_under_the_microscope():
    notebook = nbformat.read(ROOT / "exercises" / "one_step.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert sum(pictures) == 2  # a reader on the web sees them
    for cell in code:
        cell.outputs = []
    folder = {"metadata": {"path": str(ROOT / "exercises")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    assert [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code] == pictures
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "by hand" in printed and "nan" not in printed
