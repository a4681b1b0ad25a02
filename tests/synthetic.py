"SYNTHETIC run folders: invented round numbers, written by the hidden cells of two lessons, only ever to a temporary folder."
from conftest import ROOT, code_cells

IMPORTS = """
import json
from pathlib import Path
import numpy as np
from penaltyanon.core.files import write_json, write_yaml
from penaltyanon.core.settings import resolve, settings_dict
"""


def writers(notebook):
    "The functions that write synthetic run folders in a lesson."
    cell = next(c.source for c in code_cells(ROOT/notebook) if "def fake_run(" in c.source)
    scope = {}
    exec(IMPORTS + cell, scope)
    return scope


scored, predicted = writers("nbs/results/1_report.ipynb"), writers("nbs/results/2_tables.ipynb")
fake_run, fake_sweep = scored["fake_run"], scored["fake_sweep"]                             # with curves and frames
fake_predicted_run, fake_action = predicted["fake_run"], predicted["fake_action"]           # with predictions and further tests
