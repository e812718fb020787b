"""What the wheel holds, what its metadata says, and which package may import which."""

import ast
import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jflash", "pallas_kernels", "interop")
TORCH_SIDE = ROOT / "jflash" / "torch.py"  # `interop` under another name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_three_packages_and_nothing_else(wheel):
    version = metadata(wheel)["Version"]
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {*PACKAGES, f"jflash-{version}.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_module(wheel, package):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    held = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert held == modules


def test_wheel_is_pure_python(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Tag: py3-none-any" in wheel.read(name).decode()


def test_metadata(wheel):
    found = metadata(wheel)
    assert found["Name"] == "jflash"
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("License-File") == ["LICENSE"]
    assert {"torch", "flax", "cuda13", "bench", "dev"} <= set(found.get_all("Provides-Extra"))
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0].split("<")[0] for line in required) == ["absl-py", "jax", "numpy"]


def test_version_is_the_package_s(wheel):
    import jflash

    assert metadata(wheel)["Version"] == jflash.__version__


@pytest.mark.parametrize("unwanted", ["torch", "flax", "interop", "jax.experimental.mosaic"])
def test_import_jflash_does_not_import(unwanted):
    assert unwanted not in modules_after("import jflash")


def test_import_jflash_touches_no_device():
    assert "initialised" not in modules_after("import jflash")


def test_import_interop_touches_no_device():
    pytest.importorskip("torch")
    assert "initialised" not in modules_after("import interop")


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has imported after a statement; "initialised" if JAX has its devices."""
    program = (
        f"import sys\n{statement}\nbridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print(*sys.modules, *(['initialised'] if bridge and bridge._backends else []))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pallas_kernels", {"jflash", "interop", "torch", "flax", "tests", "bench", "examples"}),
        ("jflash", {"interop", "torch", "tests", "bench", "examples"}),
        ("interop", {"tests", "bench", "examples"}),
    ],
)
def test_dependencies_point_one_way(package, forbidden):
    for path in sources(package):
        if path != TORCH_SIDE:
            assert not {name.split(".")[0] for name in imports(path)} & forbidden, path


@pytest.mark.parametrize("folder", ["tests", "bench", "examples"])
def test_outsiders_import_public_names_only(folder):
    for path in sources(folder):
        if ROOT / "tests" / "kernels" in path.parents:
            continue
        ours = (name for name in imports(path) if name.split(".")[0] in PACKAGES)
        private = [name for name in ours if any(part.startswith("_") for part in name.split("."))]
        assert not private, path


def test_each_rule_can_fail(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("def f():\n    from jflash import _op\n    import interop.sdpa as s\n")
    assert imports(path) == {"jflash", "jflash._op", "interop.sdpa"}
