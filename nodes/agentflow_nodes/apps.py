"""Loading an app: the module whose functions a worker runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from agentflow.errors import InvalidRequest


def load_app(spec: str, base: Path | None = None) -> ModuleType:
    """Import an app: a module's name ("shop.tasks") or a Python file ("release/tasks.py").

    Both are looked for from `base`, by default the current folder. A file's own folder is
    put on the path, so that it can import what lies beside it; its module is called after
    it. Raises InvalidRequest saying what was expected and what was found.
    """
    base = (base or Path.cwd()).resolve()
    if spec.endswith(".py") or os.sep in spec:
        return _load_file(spec, (base / spec).resolve())
    _put_on_path(base)
    try:
        return importlib.import_module(spec)
    except ModuleNotFoundError as error:
        if error.name is not None and (spec == error.name or spec.startswith(error.name + ".")):
            found = f"found no module {error.name!r} from {base}"
            raise InvalidRequest(f"app {spec!r}: expected a module or a Python file, {found}") from error
        _fail(spec, error)
    except Exception as error:  # noqa: BLE001 - whatever a module does when it is imported
        _fail(spec, error)


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidRequest(f"app {spec!r}: expected a Python file, found none at {path}")
    _put_on_path(path.parent)
    known = sys.modules.get(path.stem)
    if known is not None and Path(known.__file__ or "").resolve() != path:
        raise InvalidRequest(
            f"app {spec!r}: a module called {path.stem!r} is loaded already; give the file another name"
        )
    try:
        return importlib.import_module(path.stem)
    except Exception as error:  # noqa: BLE001 - whatever a module does when it is imported
        _fail(spec, error)


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _fail(spec: str, error: Exception) -> NoReturn:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    message = f"app {spec!r}: cannot be loaded: {type(error).__name__}: {error}{where}"
    raise InvalidRequest(message) from error
