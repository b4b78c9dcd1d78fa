"""Each package, built as a wheel and installed alone, works with what its metadata ask for and nothing else.

A fresh virtual environment gets the wheels under test. Third-party libraries are not downloaded again: their files are
linked in from this environment, but only those of the distributions that the wheels require, directly or through others.
So a dependency that somebody forgot to declare is missing there, as it would be for a user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sae_core.cli.new_plugin import render, variables_for
from sae_core.plugins.manager import KINDS

pytestmark = pytest.mark.slow

PACKAGES = Path(__file__).parents[1] / "packages"
MEMBERS = sorted(path.parent.name for path in PACKAGES.glob("*/pyproject.toml"))

LIFE_OF_AN_SAE = """
import sys, tempfile, warnings
warnings.simplefilter("error")
import sae_core
from sae_core import SAE, create
from sae_core.plugins import get_registry
from sae_core.plugins.manager import KINDS

import torch
x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
sae = create("topk", d_in=16, d_sae=64, k=4, seed=1)
latents = sae.encode(x)
assert latents.shape == (5, 3, 64) and int((latents != 0).sum(-1).max()) <= 4
assert torch.allclose(sae.decode(latents), sae(x), atol=1e-6)
with tempfile.TemporaryDirectory() as folder:
    loaded = SAE.load(sae.save(folder + "/saved"))
    assert torch.allclose(loaded(x), sae(x), atol=1e-5)

registry = get_registry()
resolved = [
    registry.resolve(kind, contribution.qualified).__name__
    for kind in KINDS
    for contribution in registry.contributions(kind)
]
print(len(resolved), sae_core.__file__)
"""


class Wheel:
    """A built wheel and its metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.files = archive.namelist()
            (metadata,) = [name for name in self.files if name.endswith(".dist-info/METADATA")]
            self.metadata: Message = Parser().parsestr(archive.read(metadata).decode())

    @property
    def requires(self) -> list[Requirement]:
        """What installing it brings, extras aside."""
        lines = [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]
        return [line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]


class Environment:
    """A virtual environment with some of the wheels and the libraries that they require."""

    def __init__(self, folder: Path, wheels: Iterable[Wheel]) -> None:
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, folder], check=True, timeout=120)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        for wheel in wheels:
            command = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", folder, wheel.path]
            subprocess.run(command, check=True, timeout=120)
        for library in closure(requirement for wheel in wheels for requirement in wheel.requires):
            for name in top_level(library):
                if not (site / name).exists():
                    (site / name).symlink_to(library.locate_file(name))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment with no trace of ours."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SAE_", "VIRTUAL_"))
        }
        program, *arguments = command
        return subprocess.run(
            [self.bin / program, *arguments],
            env=kept | {"OMP_NUM_THREADS": "1"},
            cwd=self.bin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def closure(requirements: Iterable[Requirement]) -> Iterator[Distribution]:
    """The installed third-party distributions that the requirements need, each once. Our own are left out."""
    seen: set[tuple[str, str]] = set()
    found: set[str] = set()
    queue = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in MEMBERS or (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            library = distribution(name)
        except PackageNotFoundError:
            continue  # what a marker of a dependency asks for may be absent; what is needed shows when it is imported
        if name not in found:
            found.add(name)
            yield library
        for line in map(Requirement, library.requires or ()):
            if line.marker is None or line.marker.evaluate({"extra": extra}):
                queue += [(line, inner) for inner in ("", *line.extras)]


def top_level(library: Distribution) -> set[str]:
    """The names that a distribution puts into site-packages."""
    return {file.parts[0] for file in library.files or () if file.parts[0] not in ("..", "__pycache__")}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """All packages, built from source distributions as a release is."""
    out = tmp_path_factory.mktemp("dist")
    built: dict[str, Wheel] = {}
    for name in MEMBERS:
        # Not from the working tree directly: what the source distribution lacks would be missing for those who build from it.
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, PACKAGES / name]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        (path,) = out.glob(f"{name.replace('-', '_')}-*.whl")
        built[name] = Wheel(path)
    return built


@pytest.mark.parametrize("name", MEMBERS)
def test_a_wheel_holds_the_package_and_nothing_else(wheels: dict[str, Wheel], name: str) -> None:
    package = name.replace("-", "_")
    wheel = wheels[name]
    tops = {file.split("/")[0] for file in wheel.files}
    assert tops == {package, f"{package}-{wheel.metadata['Version']}.dist-info"}
    for part in ("__init__.py", "_plugin.py", "py.typed"):
        assert f"{package}/{part}" in wheel.files
    source = PACKAGES / name / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {file for file in wheel.files if file.startswith(f"{package}/")} == expected


def check_life(environment: Environment, plugins: list[str]) -> None:
    """`plugins` are listed, an SAE lives its life, and every name that is offered leads to its class."""
    listed = environment.run("sae-core", "list-plugins", "--json", "--strict")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    found = json.loads(listed.stdout)["plugins"]
    assert [plugin["distribution"] for plugin in found] == plugins
    lived = environment.run("python", "-c", LIFE_OF_AN_SAE)
    assert lived.returncode == 0, lived.stderr
    resolved, home = lived.stdout.split(maxsplit=1)
    assert int(resolved) == sum(len(plugin["provides"]) for plugin in found)
    assert Path(home.strip()).is_relative_to(environment.bin.parent)


def test_the_core_works_alone(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", [wheels["sae-core"]])
    check_life(environment, ["sae-core"])
    assert environment.run("python", "-c", "import transformers").returncode == 1, "the environment is not isolated"
    written = environment.run("sae-core", "new-plugin", "cubic", "--into", str(tmp_path))
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "sae-cubic" / "src" / "sae_cubic" / "_plugin.py").is_file()


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "sae-core"])
def test_the_core_works_with_one_plugin(wheels: dict[str, Wheel], tmp_path: Path, name: str) -> None:
    ours = {canonicalize_name(requirement.name) for requirement in wheels[name].requires} & set(MEMBERS)
    environment = Environment(tmp_path / "venv", [wheels[member] for member in sorted({name, *ours})])
    check_life(environment, sorted({name, *ours}))


USES_ALL_KINDS = """
import os, sys
from pathlib import Path
import torch
from sae_core import SAE, create
from sae_core.cli import main
from sae_core.format.convert import convert
from sae_core.plugins import get_registry
from sae_core.run import execute, read_run

here = Path(sys.argv[1])
(here / "run.yaml").write_text(f'''
output: {here / "run"}
sae: {{architecture: mine_architecture, d_sae: 32}}
source: {{name: mine_source, d_in: 8}}
loggers: [{{name: mine_logger, path: {here / "log.txt"}}}]
train: {{total_samples: 256, batch_size: 64, log_every_steps: 2, init_samples: 64, progress_bar: false}}
''')
sae = execute(read_run(here / "run.yaml")).sae
lines = (here / "log.txt").read_text().splitlines()
assert len(lines) == 2 and lines[0].startswith("step=2 samples=128"), lines

metric = get_registry().resolve("metric", "mine_metric")()
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
metric.update(x, sae(x), sae.encode_sparse(x))
assert 0 < metric.compute()["mine_metric"] < 1

loader = get_registry().resolve("loader", "mine_loader")
(here / "foreign").mkdir()
foreign = SAE.load(loader.example["path"](here / "foreign"))
assert foreign.d_sae == 24 and bool((foreign.encode(x) != 0).any())
assert main(["mine-command", str(here / "foreign"), "--most", "3"]) == 0

shared = here / "shared" / "mine_catalogue" / "mine_catalogue-small"
foreign.save(shared / "layers" / "3")
os.environ["MINE_CATALOGUE_SAES"] = str(here / "shared")
found = SAE.from_pretrained("mine_catalogue-small", "layer_3")
assert torch.allclose(found(x), foreign(x), atol=1e-5)

assert convert(foreign, "mine_writer", here / "converted") == ["facts about the model and training are left out"]
assert (here / "converted" / "mine_writer.npz").is_file()
"""

MISSES_ALL_KINDS = """
import sys
from pathlib import Path
from sae_core import SAE
from sae_core.cli import main
from sae_core.errors import SaeCoreError

here = Path(sys.argv[1])
try:
    SAE.load(here / "run")
except SaeCoreError as error:
    print("architecture:", " ".join(str(error).split()))
for kind, arguments in {
    "source": ["train", "--resume", str(here / "run")],
    "loader": ["show", "--kind", "loader", "sae-mine-loader:mine_loader"],
}.items():
    print(kind, main(arguments))
try:
    SAE.load(here / "foreign")
except SaeCoreError as error:
    print("files:", error)
"""


def test_a_new_plugin_of_every_kind_is_installed_listed_used_and_removed(
    wheels: dict[str, Wheel], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv", [wheels["sae-core"]])
    projects = [render(tmp_path / "projects", variables_for(f"mine_{kind}", kind)) for kind in KINDS]
    built = [WheelBuilder(str(project)).build(versions=["standard"]) for project in projects]
    paths = [Path(str(path)) for each in built for path in each]
    command = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", tmp_path / "venv", *paths]
    subprocess.run(command, check=True, timeout=120)

    listed = environment.run("sae-core", "list-plugins", "--json", "--strict")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    given = {plugin["distribution"]: plugin["provides"] for plugin in json.loads(listed.stdout)["plugins"]}
    assert given.pop("sae-core")
    assert {owner: [(each["kind"], each["name"]) for each in gives] for owner, gives in given.items()} == {
        f"sae-mine-{kind}": [(kind, f"mine_{kind}")] for kind in KINDS
    }
    used = environment.run("python", "-W", "error", "-c", USES_ALL_KINDS, str(tmp_path))
    assert used.returncode == 0, used.stderr
    assert len(used.stdout.splitlines()) == 3  # of the command

    names = [project.name for project in projects]
    subprocess.run(
        ["uv", "pip", "uninstall", "--quiet", "--python", tmp_path / "venv", *names], check=True, timeout=120
    )
    missed = environment.run("python", "-W", "error", "-c", MISSES_ALL_KINDS, str(tmp_path))
    assert missed.returncode == 0, missed.stderr
    assert "comes with sae-mine-architecture, which is not installed: pip install" in missed.stdout
    assert "comes with sae-mine-source, which is not installed: pip install sae-mine-source" in missed.stderr
    assert "comes with sae-mine-loader, which is not installed: pip install sae-mine-loader" in missed.stderr
    assert "source 1" in missed.stdout
    assert "no known format" in missed.stdout
