"All metadata is in settings.ini; the notebooks that `penaltyanon sweep` runs travel inside the wheel."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lines = lambda key: cfg.get(key, "").split("\n")[1:]
extras = {k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")}
HOLDS = {"export": ["train", "edge"], "dp": ["train"], "run": ["train"], "dev": [k for k in extras if k != "dev"]}   # extras in extras
extras |= {k: sum((extras[e] for e in [k, *held]), []) for k, held in HOLDS.items()}


class BuildWithNotebooks(build_py):
    "Copy nbs/runs and nbs/figures to penaltyanon/nbs in a built wheel (an editable install finds them beside the package)."
    def run(self):
        super().run()
        if self.editable_mode: return
        for nb in [*root.glob("nbs/runs/*.ipynb"), *root.glob("nbs/figures/*.ipynb")]:
            target = Path(self.build_lib)/"penaltyanon"/nb.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(nb, target)


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=(root/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["penaltyanon", "penaltyanon.*"]), cmdclass={"build_py": BuildWithNotebooks},
    package_data={"penaltyanon.data": ["mini.txt"], "penaltyanon.avatar": ["body.npz"]},
    python_requires=f">={cfg['min_python']}", install_requires=lines("requirements"), extras_require=extras,
    entry_points={"console_scripts": [cfg["console_scripts"]]}, zip_safe=False,
)
