"""The project's tasks: ``nox`` runs the usual ones, ``nox -s NAME`` one of them, and CI runs these sessions too.

Sessions run in the environment that is active; ``pip install -e ".[dev]"`` installs what they need.
"""

import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SMALL_DEMO = ("--questions=3", "--held_out=3", "--held_out_responses=2", "--rollouts_per_question=2")
BENCHMARKS = sorted(
    path.stem for path in ROOT.glob("benchmarks/*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8")
)
"""Scripts in ``benchmarks`` that can be run; the others there are imported by these."""

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def format(session: nox.Session) -> None:
    """Format the code, and fix what can be fixed automatically."""
    session.run("ruff", "format", ".")
    session.run("ruff", "check", "--fix", ".")


@nox.session
def lint(session: nox.Session) -> None:
    """Check format and style."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the fast tests and doctests, in several processes; arguments of pytest after ``--``."""
    session.run("pytest", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """Run all tests, including slow ones, in a browser and with vLLM; arguments of pytest after ``--``."""
    session.run("pytest", "-m", "", *session.posargs)


@nox.session
def engines(session: nox.Session) -> None:
    """Run the tests with a real vLLM, which is installed into ``.venv-vllm`` if it is not there (3 GB)."""
    session.run("pytest", "-n0", "-m", "vllm", "tests/engine/engines", *session.posargs, env={"ODP_INSTALL_VLLM": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, without a warning, into the folder ``site``; its search must find all public names."""
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo: a tiny one, or one with the arguments after ``--``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = session.posargs or [*SMALL_DEMO, f"--output={folder}"]
        session.run("odp-callbacks", "demo", *arguments)


@nox.session
def examples(session: nox.Session) -> None:
    """Run all examples and notebooks, or those whose names follow ``--``."""
    all_paths = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.ipynb")])
    paths = [path for path in all_paths if path.stem in session.posargs or not session.posargs]
    # In a folder of their own: examples write logs, and must not depend on the repository around them.
    with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
        for path in paths:
            command = ("jupyter", "execute") if path.suffix == ".ipynb" else ("python",)
            session.run(*command, str(path))


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run all benchmarks at their smallest size, or those whose names follow ``--``."""
    for name in session.posargs or BENCHMARKS:
        session.run("python", str(ROOT / "benchmarks" / f"{name}.py"), "--smoke")


@nox.session
def distribution(session: nox.Session) -> None:
    """Build wheel and source distribution, and check that the latter's own tests can run."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder, str(ROOT))
        (archive,) = Path(folder).glob("*.tar.gz")
        session.run("tar", "-xzf", str(archive), "-C", folder, external=True)
        with session.chdir(archive.parent / archive.name.removesuffix(".tar.gz")):
            session.run(
                "pytest", "-q", "-n0", "tests/test_docs.py", "tests/test_architecture.py", env={"PYTHONPATH": "src"}
            )
            session.run("pytest", "-q", "-n0", "--collect-only", "-m", "", env={"PYTHONPATH": "src"}, silent=True)
