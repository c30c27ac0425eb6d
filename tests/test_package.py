"""What is built of the project: complete, and of use outside of its folder."""

import email
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.long


def run(*command, cwd=None, env=None):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is made of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def test_the_source_is_complete(built):
    tracked = run("git", "ls-files", cwd=ROOT).split()
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = {name for name in tracked if name not in names}
    assert {name.partition("/")[0] for name in left_out} <= {
        *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml")
    }


def test_what_the_wheel_says_of_itself(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        [path] = [name for name in names if name.endswith("METADATA")]
        said = email.message_from_bytes(archive.read(path))
    assert "hk_stack/py.typed" in names
    assert "hk_stack/compare/page.html.jinja" in names
    assert not [name for name in names if name.startswith(("tests", "docs"))]
    assert said["Author"] and said["Keywords"] and said["License-Expression"]
    assert len(said.get_all("Classifier")) > 5
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


PROGRAM = """
import haiku as hk, jax, jax.numpy as jnp, hk_stack
print(hk_stack.__file__)
stack = hk_stack.layer_stack(3, name="s")
model = hk.transform(stack(lambda x: jnp.tanh(hk.Linear(4)(x))))
params = model.init(jax.random.key(0), jnp.ones([2, 4]))
print(hk_stack.summary(model.apply, params, None, jnp.ones([2, 4])))
print(hk_stack.checkpoint.latest)
"""


@pytest.mark.parametrize("which", [0, 1], ids=["source", "wheel"])
def test_installed_it_runs_outside_of_its_folder(built, which, tmp_path):
    target = tmp_path / "out"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
    run(*pip, "--target", target, built[which])
    env = {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    printed = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, env=env)
    assert printed.startswith(str(target))
    for command in ("hk-stack-compare", "hk-stack-port"):
        printed = run(sys.executable, target / "bin" / command, "--help", env=env)
        assert "]cast" in printed or "--frameworks" in printed
