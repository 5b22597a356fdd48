"""One entry point for the habits: ``nox`` runs what CI runs."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def format(session: nox.Session) -> None:
    """Format the code and mend what can be mended."""
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
    """Run tests and doctests."""
    session.run("pytest", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo; flags after ``--``."""
    session.run("odp-callbacks", "demo", *session.posargs)
