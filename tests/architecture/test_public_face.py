"""What a user's program sees: few names, light imports, a stable list of commands and options."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import chiasm


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_light() -> None:
    heavy = {"torch", "transformers", "pandas", "sklearn", "matplotlib", "lancedb", "PIL", "scipy", "peft", "pyarrow"}
    assert not loaded_after("import chiasm") & heavy
    assert not loaded_after("import chiasm.cli.main") & heavy


def test_tasks_run_without_torch() -> None:
    modules = "import chiasm.tasks.zero_shot, chiasm.tasks.retrieval, chiasm.tasks.prompts, chiasm.tasks.inspection"
    assert "torch" not in loaded_after(modules)
    assert "torch" not in loaded_after(
        "import chiasm.metrics.classification, chiasm.metrics.bootstrap, chiasm.io.store"
    )


def test_public_names_are_few_and_exist() -> None:
    assert len(chiasm.__all__) <= 25
    for name in chiasm.__all__:
        assert getattr(chiasm, name) is not None
    assert set(chiasm.__all__) <= set(dir(chiasm))


def test_commands_have_json_and_help() -> None:
    from typer.main import get_command

    from chiasm.cli.main import COMMANDS, app

    group = get_command(app)
    assert set(group.commands) == {c.replace("_", "-") for c in COMMANDS}
    for name, command in group.commands.items():
        options = {o for p in command.params for o in p.opts}
        assert "--json" in options, name
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_constraints_pin_the_cpu_torch() -> None:
    import torch

    assert torch.__version__.split("+")[0] == "2.13.0"
    assert torch.version.cuda is None


def test_json_of_doctor_is_valid() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chiasm.cli.main", "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chiasm"] == chiasm.__version__


def test_a_wheel_holds_every_data_file() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    package = root / "src" / "chiasm"
    packed = {p for pattern in settings["tool"]["setuptools"]["package-data"]["chiasm"] for p in package.glob(pattern)}
    built = (".c", ".so", ".pyd")  # of the extensions that setup.py names
    files = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", *built)}
    assert files <= packed, files - packed
    sources = (root / "setup.py").read_text()
    assert all(str(p.relative_to(root)) in sources for p in package.rglob("*.c"))
