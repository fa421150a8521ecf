"""Rules for calls that let a stranger's file do more than be read, found in a syntax tree without running anything.

Names are followed through imports (`import numpy as np`, `from yaml import load as read`), not through variables; what
a rule names is found wherever it is mentioned, called or not, so that handing it on is found too.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Found = Iterator[tuple[str, str]]
"""Pairs of a rule and what it found."""

BUILTINS = frozenset(dir(builtins))
BANNED_MODULES = {
    "pickles": "pickle _pickle cPickle marshal shelve dill cloudpickle joblib jsonpickle torch.package",
    "code": "builtins code codeop runpy torch.hub",
    "xml": "xml lxml xmltodict",
    "archives": "tarfile",
}
MENTIONS = {
    "pickles": r"pandas\.read_pickle|numpy\.lib\.format\.read_array|torch\.jit\.load",
    "code": r"eval|exec|compile|__import__|importlib\.(?:util\.spec_from_file_location|machinery\..*)|torch\.hub\..*",
    "yaml": r"yaml\.(?:load|load_all|full_load\w*|unsafe_load\w*|C?Loader|C?FullLoader|C?UnsafeLoader)",
    "shell": r"os\.(?:system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty\.spawn|subprocess\.get(?:status)?output"
    r"|asyncio\.create_subprocess_shell",
    "temporary": r"tempfile\.mktemp|os\.(?:tempnam|tmpnam)",
    "ssl": r"ssl\.(?:_create_\w+|CERT_NONE|wrap_socket)",
    "archives": r"shutil\.unpack_archive",
    "files": r"open|io\.(?:open|open_code|FileIO)|os\.open|codecs\.open"
    r"|numpy\.(?:memmap|fromfile|load|loadtxt|genfromtxt)|mmap\.mmap|safetensors\.(?:safe_open|\w+\.load_file)|gguf\.GGUFReader"
    r"|linecache\.getlines?|fileinput\.input",
}
_MENTIONED = re.compile("|".join(f"(?P<{rule}>{pattern})" for rule, pattern in MENTIONS.items()))
METHODS = {
    "archives": frozenset({"extractall", "unpack_archive"}),
    "files": frozenset({"read_bytes", "read_text"}),
}
NOT_FALSE = {  # keyword arguments that may only be False
    "pickles": frozenset({"allow_pickle"}),
    "shell": frozenset({"shell"}),
    "remote code": frozenset({"trust_remote_code"}),
}
NOT_OFF = frozenset({"verify", "verify_ssl", "check_hostname"})
"""Keyword arguments that may not be False."""
TEMPLATES = frozenset(
    {"jinja2.Template", "jinja2.nativetypes.NativeEnvironment", "jinja2.sandbox.SandboxedEnvironment"}
)
LIBRARIES = frozenset({"ctypes.CDLL", "ctypes.PyDLL", "ctypes.cdll.LoadLibrary", "ctypes.WinDLL", "cffi.FFI"})


@dataclass(frozen=True)
class Names:
    """What a file's own names stand for."""

    imported: Mapping[str, str]

    @classmethod
    def of(cls, tree: ast.AST) -> Names:
        found: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for each in node.names:
                    found[each.asname or each.name.partition(".")[0]] = (
                        each.name if each.asname else each.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.update({each.asname or each.name: f"{node.module}.{each.name}" for each in node.names})
        return cls(found)

    def full(self, node: ast.AST) -> str:
        """Dotted name of what an expression mentions, "" where it is no name."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, node.id if node.id in BUILTINS else "")
        if isinstance(node, ast.Attribute):
            before = self.full(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""


def unsafe_calls(text: str) -> list[tuple[str, str]]:
    """Gives what the rules find in a file's text, in no order."""
    tree = ast.parse(text)
    names = Names.of(tree)
    return [found for node in ast.walk(tree) for rule in RULES.get(type(node), ()) for found in rule(node, names)]


def _imports(node: ast.AST, names: Names) -> Found:
    del names
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [each.name for each in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
    for rule, banned in BANNED_MODULES.items():
        for name in banned.split():
            if any(module == name or module.startswith(name + ".") for module in modules):
                yield rule, name


def _mentions(node: ast.AST, names: Names) -> Found:
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        full = names.full(node)
        match = _MENTIONED.fullmatch(full) if full else None
        if match is not None and match.lastgroup is not None:
            yield match.lastgroup, full
    if isinstance(node, ast.Attribute):
        for rule, methods in METHODS.items():
            if node.attr in methods:
                yield rule, node.attr


def _opened(node: ast.AST, names: Names) -> Found:
    """A path's own `open`, which is told from other things' by its mode."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open":
        mode = node.args[0] if node.args else next((each.value for each in node.keywords if each.arg == "mode"), None)
        text = mode.value if isinstance(mode, ast.Constant) else None
        bare = not node.args and not node.keywords and not names.full(node.func)
        if bare or (isinstance(text, str) and re.fullmatch(r"[rwxabt+]+", text)):
            yield "files", ".open"


def _keywords(node: ast.AST, names: Names) -> Found:
    del names
    if isinstance(node, ast.Call):
        for each in node.keywords:
            value = each.value.value if isinstance(each.value, ast.Constant) else ...
            for rule, banned in NOT_FALSE.items():
                if each.arg in banned and value is not False:
                    yield rule, f"{each.arg}="
            if each.arg in NOT_OFF and value is False:
                yield "ssl", f"{each.arg}=False"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is False:
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr in NOT_OFF:
                yield "ssl", f"{target.attr}=False"


def _texts(node: ast.AST, names: Names) -> Found:
    """Keys of options, and commands that are written for users."""
    del names
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "trust_remote_code" in node.value:
        yield "remote code", "trust_remote_code in a text"


def _calls(node: ast.AST, names: Names) -> Found:
    if not isinstance(node, ast.Call):
        return
    full, given = names.full(node.func), {each.arg: each.value for each in node.keywords}
    first = node.args[0] if node.args else None
    fixed = isinstance(first, ast.Constant)
    if full == "torch.load" and not _is(given.get("weights_only"), True):
        yield "pickles", "torch.load"
    if full in ("onnx.load", "onnx.load_model") and not _is(given.get("load_external_data"), False):
        yield "external data", full
    if full.startswith("onnx.external_data_helper.load") or full == "onnx_ir.load":
        yield "external data", full
    if full in ("importlib.import_module", "importlib.reload") and not fixed:
        yield "computed import", full
    if full in LIBRARIES and not fixed:
        yield "library", full
    if full in TEMPLATES or full == "jinja2.Environment" or full == "jinja2.environment.Environment":
        yield "templates", full


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


Rule = Callable[[ast.AST, Names], Found]
RULES: Mapping[type[ast.AST], tuple[Rule, ...]] = {
    ast.Import: (_imports,),
    ast.ImportFrom: (_imports,),
    ast.Name: (_mentions,),
    ast.Attribute: (_mentions,),
    ast.Call: (_opened, _keywords, _calls),
    ast.Assign: (_keywords,),
    ast.Constant: (_texts,),
}
"""Rules by the kind of node that they look at."""
