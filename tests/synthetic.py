"SYNTHETIC run folders: invented round numbers, written by the hidden cell of nbs/results/1_report.ipynb, only ever to a temporary folder."
from conftest import ROOT, code_cells

cell = next(c.source for c in code_cells(ROOT/"nbs/results/1_report.ipynb") if "def fake_run(" in c.source)
scope = {}
exec("import json\nfrom pathlib import Path\nimport numpy as np\n" + cell.split("tmp = tempfile")[0], scope)
fake_run, fake_sweep = scope["fake_run"], scope["fake_sweep"]
