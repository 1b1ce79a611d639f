"""The house rules that can be read off the source: who imports whom, sizes, a torch-free import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import wsiseg

ROOT = Path(wsiseg.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FOUNDATION = {
    "atomic",
    "canvas",
    "canvas_store",
    "classes",
    "cleaning",
    "config",
    "errors",
    "geometry",
    "lease",
    "lettering",
    "names",
    "objects",
    "joining",
    "parting",
    "regions",
    "stain",
    "__version__",
}
ROOMS = {
    "slides": set(),
    "models": set(),
    "datasets": {"slides"},
    "inference": {"models"},
    "outputs": set(),
    "training": {"slides", "models", "datasets"},
    # Shows what is there: opens slides, reads outputs back, computes nothing.
    "viewer": {"slides", "outputs"},
    "cli": {"slides", "models", "datasets", "inference", "outputs", "training", "viewer"},
}
LIBRARIES = {
    "torch": {"models", "datasets", "inference", "training"},
    "safetensors": {"models", "training"},
    "timm": {"models"},
    "diffusers": {"models"},
    "openslide": {"slides"},
    "tiffslide": {"slides"},
    "tifffile": {"slides", "outputs"},
    "shapely": {"outputs"},
    "geojson": {"outputs"},
    "matplotlib": {"training"},
    "accelerate": {"training"},
    "triton": {"models"},
    "tensorboardX": {"training"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "ray": {"cli"},
}


def imports(path: Path) -> set[tuple[str, ...]]:
    """Dotted names imported anywhere in a file."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")) for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = tuple(node.module.split("."))
            found |= {(*base, a.name) if base == ("wsiseg",) else base for a in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_rooms_import_only_what_is_below_them() -> None:
    wrong = []
    for path in FILES:
        here = room(path)
        for name in imports(path):
            if name[0] != "wsiseg" or len(name) < 2 or here == "__init__":
                continue
            allowed = ROOMS.get(here, set()) | {here} | FOUNDATION
            if name[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name[0]}"
        for path in FILES
        for name in imports(path)
        if name[0] in LIBRARIES and room(path) not in LIBRARIES[name[0]]
    ]
    assert not wrong


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 300:
            wrong.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and room(path) != "cli":
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
                if ast.unparse(ast.Tuple(node.decorator_list)) == "(triton.jit,)":
                    count = 0  # a kernel has an argument for each pointer and size
                if lines > 50 or count > 6:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name} {lines} lines {count} args")
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    assert [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_import_and_help_are_light() -> None:
    code = (
        "import sys, wsiseg, wsiseg.cli\n"
        "from click.testing import CliRunner\n"
        "assert CliRunner().invoke(wsiseg.cli.cli, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'timm', 'openslide', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
