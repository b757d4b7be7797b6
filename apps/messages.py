"""What a parser or a constructor complains about, as one line for a person."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from apps import recipes
from polyhead.errors import UserError, causes, nearest, reason

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping, such as '{key: value}'",
    "list": "a list, such as '[a, b]'",
    "tuple": "a list, such as '[1, 2]'",
    "NoneType": "null",
}
# Where the classes that an option may name are found, beside those of shipped recipes
HOMES = {
    "optimizer": ("torch.optim",),
    "scheduler": ("polyhead.schedules", "torch.optim.lr_scheduler"),
    "callbacks": ("pytorch_lightning.callbacks", "polyhead.progress"),
    "logger": ("polyhead.progress", "pytorch_lightning.loggers"),
}
CLASSES_FROM_DATA = "the number of classes comes from the data"


class Options(argparse.ArgumentParser):
    """argparse for our own subcommands: no abbreviations, and a mistake is one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (\S+)", message)
        name = self.prog.split()[-1]
        if found:
            options = re.findall(r"--[\w.]+", self.format_usage())
            hints = _did_you_mean(nearest(found[1], options)[:1]) or [f"`{self.prog} --help` lists all"]
            raise UserError(f"{name} has no option {found[1]}", hints)
        raise UserError(f"{name}: {message}")


class Complaint(Exception):
    """What a parser says about a command line; `plain` makes it a person's line."""


@dataclass
class Call:
    """What a person wrote, for saying where a mistake is.

    Attributes:
        subcommand: its name.
        words: the command line after it.
        configs: the files given as --config.
        options: gives the names of all options, without dashes.
        defaults: the checkpoint or bundle whose settings are the defaults.
    """

    subcommand: str = ""
    words: Sequence[str] = ()
    configs: Sequence[Path] = ()
    options: Callable[[], Iterable[str]] = field(default=lambda: ())
    defaults: str = ""

    def given(self, key: str) -> bool:
        """Whether the command line has the option `key`, with or without `init_args`."""
        return any(option_name(word) == key for word in self.words)

    def names(self, key: str) -> bool:
        """Whether the command line or a file in it says anything about `key`."""
        return self.given(key) or any(recipes.line_of(path, key) is not None for path in self.configs)

    def where(self, key: str) -> str:
        """The option or the place in a file that gave `key`."""
        head = key.partition(".")[0]
        if self.given(key):
            return f"--{key}"
        if self.given(head):
            return f"--{head}: {key}"
        for path in reversed(self.configs):
            line = recipes.line_of(path, key)
            if line is not None:
                return f"{recipes.shown(path)}, line {line}: {key}"
        return f"{self.defaults}: {key}" if self.defaults else key


def option_name(word: str) -> str | None:
    """`model.lr` for `--model.init_args.lr=3`; None for what is no option."""
    if not word.startswith("--"):
        return None
    return word.removeprefix("--").partition("=")[0].removesuffix("+").replace(".init_args", "")


def class_paths(kind: str | None = None) -> list[str]:
    """Every class that a shipped recipe names as its model or data."""
    kinds = (kind,) if kind in ("model", "data") else ("model", "data")
    contents = [recipes.read(recipes.find(name)) for name in recipes.names()]
    return sorted({content[k]["class_path"] for content in contents for k in kinds if k in content})


def user_error(error: BaseException | None) -> UserError | None:
    """The person's error that an exception stems from, if it does."""
    return next((e for e in causes(error) if isinstance(e, UserError)), None)


def plain(message: str, error: BaseException | None = None, call: Call | None = None) -> UserError:
    """A parser's message as one line that says what and where, with the nearest name for what was misspelt."""
    found = user_error(error)
    if found is not None:
        return found
    call = call or Call()
    text = message.strip() or reason(error or Exception(message))
    for kind in (_unrecognised, _no_such_key, _linked, _required, _choice, _no_value):
        made = kind(text, call)
        if made is not None:
            return made
    if 'Parser key "' in text:
        return _value(text, call)
    return UserError(_first_sentences(text))


def _first_sentences(text: str, limit: int = 160) -> str:
    short = ""
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
        if short and len(short) + len(sentence) > limit:
            break
        short = f"{short} {sentence}".strip()
    return short[: 2 * limit]


# Options and keys that do not exist


def _did_you_mean(names: Iterable[str]) -> list[str]:
    text = ", ".join(names)
    return [f"did you mean {text}?"] if text else []


def _begins_or_near(name: str, options: Sequence[str]) -> list[str]:
    begins = [o for o in options if name and o.startswith(name)]
    return begins[:3] or nearest(name, options)[:1]


def _near_option(name: str, options: Iterable[str]) -> list[str]:
    """The options most like `name`: by its first part if that is unknown, else among its siblings."""
    options = sorted(set(options))
    head, dot, _ = name.partition(".")
    groups = {o.partition(".")[0] for o in options if "." in o}
    heads = sorted(groups | {"model", "data"} if dot else {o.partition(".")[0] for o in options})
    if head in groups or head in options:
        parent, _, last = name.rpartition(".")
        siblings = [o.rpartition(".")[2] for o in options if parent and o.rpartition(".")[0] == parent]
        return [f"{parent}.{s}" for s in _begins_or_near(last, siblings)]
    near = _begins_or_near(head, heads)
    if dot or near:
        return near
    # `--lr` for `--model.optimizer.lr`
    ends = {o: o.rpartition(".")[2] for o in options}
    return ([o for o in options if ends[o] == name] or [o for o in options if ends[o].endswith(f"_{name}")])[:3]


def _unrecognised(text: str, call: Call) -> UserError | None:
    found = re.match(r"unrecognized arguments: (\S+)", text)
    if found is None:
        return None
    name = option_name(found[1])
    if name is None or not name:
        hint = "options begin with --, and take their value after them"
        return UserError(f"{call.subcommand} does not understand {found[1]!r}", [hint])
    near = _did_you_mean(f"--{n}" for n in _near_option(name, call.options()))
    return UserError(f"unknown option --{name}", near or [f"`polyhead {call.subcommand} --help` lists all"])


def _no_such_key(text: str, call: Call) -> UserError | None:
    found = re.match(r"(?:Subcommand '\w+' does not accept option|Option) '([\w.+]+)'(?: is not accepted)?", text)
    if found is None:
        return None
    key = found[1].replace(".init_args", "")
    near = _near_option(key, call.options())
    return UserError(f"{call.where(key)} is no key of a recipe", _did_you_mean(near))


def _linked(text: str, call: Call) -> UserError | None:
    found = re.match(r"argument (?:<lambda>\()?([\w.]+)\)? --> ([\w.]+):", text)
    if found is None:
        found = re.match(r'Linked "([\w.]+)" must be given via "([\w.]+)"', text)
        if found is None:
            return None
        return ignored(call.where(found[1]), f"--{found[2]}")
    return ignored(call.where(found[2].replace(".init_args", "")), f"--{found[1]}")


def ignored(what: str, source: str) -> UserError:
    """An option that something else decides."""
    return UserError(f"{what} would be ignored: {source} decides it")


def _required(text: str, call: Call) -> UserError | None:
    found = re.search(r"arguments are required: (?:\w+\.)?([\w.]+)|Key \"(?:\w+\.)?([\w.]+)\" is required", text)
    if found is None:
        return None
    key = found[1] or found[2]
    hint = ["a recipe names one: --config NAME"] if key in ("model", "data") else []
    return UserError(f"{call.subcommand} needs --{key}", hint)


def _choice(text: str, call: Call) -> UserError | None:
    found = re.match(r"argument (?:-\w/)?--([\w.]+): invalid choice: '?(.*?)'? \(choose from (.*)\)", text)
    if found is None:
        return None
    return UserError(f"{call.where(found[1])} is {found[2]!r}: one of {found[3].replace(chr(39), '')} is needed")


def _no_value(text: str, call: Call) -> UserError | None:
    found = re.match(r"argument (?:-\w/)?--([\w.]+): expected (?:one|at least one) argument", text)
    if found is None:
        return None
    # argparse names the group of a nested option
    words = list(call.words)
    alone = [w for w, after in zip(words, [*words[1:], "--"], strict=True)
             if after.startswith("--") and (option_name(w) or "").startswith(found[1]) and "=" not in w]  # fmt: skip
    return UserError(f"{alone[0] if alone else '--' + found[1]} needs a value")


# Values that do not fit


def _value(text: str, call: Call) -> UserError:
    pieces = re.split(r'Parser key "([^"]+)":', text)
    keys: list[str] = []
    for key in pieces[1::2]:
        # The alternatives of a union say the same one after the other
        if keys[-1:] != [key]:
            keys.append(key)
    tail, value = _cut(pieces[-1])
    made = _unknown_argument(text, keys, tail, call) or _class(keys, tail, value, call)
    if made is not None:
        return made
    where = call.where(".".join(keys).replace(".init_args", ""))
    wanted = _wanted(tail)
    if not wanted:
        return UserError(f"{where} is {value[:80]!r}: {' '.join(tail.split())[:200]}")
    return UserError(f"{where} is {value[:80]!r}: {wanted} is needed")


def _cut(tail: str) -> tuple[str, str]:
    """What belongs to the innermost key, and the value that was given to it."""
    found = re.search(r"(?:Given value|Got value): (.*)", tail)
    if found is None:
        return tail, ""
    value = found[1].partition(". Got value: ")[0]
    nested = re.fullmatch(r"NestedArg\(key=.*, val='?(.*?)'?\)", value)
    return tail[: found.end()], nested[1] if nested else value


def _unknown_argument(text: str, keys: list[str], tail: str, call: Call) -> UserError | None:
    found = re.search(r"Option '([\w.]+)' is not accepted", tail)
    if found is None:
        return None
    holder = re.search(r"Got value: Namespace\(class_path='([\w.]+)'", tail) if len(keys) > 1 else None
    for place in (tail, text):
        holder = holder or re.search(r"given class_path '([\w.]+)'", place)
    key = ".".join([*keys, found[1]])
    owner = holder[1] if holder else keys[-1]
    near = nearest(found[1], parameters(owner))[:1]
    hints = [CLASSES_FROM_DATA] if found[1] in ("num_classes", "n_classes") else _did_you_mean(near)
    return UserError(f"{call.where(key)}: {owner} has no option {found[1]!r}", hints)


def parameters(dotted: str) -> list[str]:
    """The arguments of a class by its dotted name, those it hands on to its bases included."""
    module, _, name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: dict[str, None] = {}
    for base in inspect.getmro(found):
        own = inspect.signature(base).parameters.values()
        names |= {p.name: None for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return [n for n in names if n not in ("params", "optimizer")] if "optim" in module else list(names)


def class_keys(content: Mapping[str, Any], parent: str = "") -> dict[str, str]:
    """Dotted key -> class path of every class in a recipe, `init_args` left out of the keys."""
    found: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            key = ".".join(filter(None, (parent, name)))
            if "class_path" in value:
                found[key] = str(value["class_path"])
            found |= class_keys(value, key.removesuffix(".init_args"))
    return found


def _class(keys: list[str], tail: str, value: str, call: Call) -> UserError | None:
    """A class path that names nothing, or the wrong kind of thing."""
    key = ".".join(keys).replace(".init_args", "")
    wrong = re.search(r"does not correspond to a subclass of (\w+)", tail)
    if wrong:
        near = class_names(keys[-1], value)
        return UserError(f"{call.where(key)} names {value!r}, which is no {wrong[1]}", _did_you_mean(near))
    missing = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", tail)
    if missing:
        value = f"{missing[1]}.{missing[2]}"
    absent = re.search(r"given class_path '([\w.]+)':\s+No module named|callable class: No module named", tail)
    if absent and absent[1]:
        value = absent[1]
    number = re.search(r"Expected a <class '(?:int|float)'>", tail)
    if missing or absent or ("Expected a dot import path" in tail and not number):
        near = class_names(keys[-1], value)
        return UserError(f"{call.where(key)} names {value!r}: there is no such class", _did_you_mean(near))
    return None


def class_names(key: str, value: str) -> list[str]:
    """The classes most like `value` that an option may name."""
    last = key.rpartition(".")[2]
    homes = HOMES.get(last, ())
    known = {} if homes else {path.rpartition(".")[2]: path for path in class_paths(last)}
    for home in homes:
        module = importlib.import_module(home)
        known = {n: f"{home}.{n}" for n in dir(module) if isinstance(getattr(module, n), type)} | known
    return [known[n] for n in nearest(value.rpartition(".")[2], known)[:1]]


def _wanted(tail: str) -> str:
    """What would have been taken, in words."""
    wanted: list[str] = []
    for literal, kind, elements in re.findall(
        r"Expected an? (?:typing\.Literal\[(.*?)\]|<class '(?:[\w.]+\.)?(\w+)'>|tuple with (\d+) elements)", tail
    ):
        if literal:
            wanted += [c for c in literal.replace("'", "").split(", ") if c not in wanted]
        elif elements:
            wanted.append(f"a list of {elements}")
        elif TYPES.get(kind, kind) not in wanted:
            wanted.append(TYPES.get(kind, f"a {kind}"))
    if len(wanted) > 1 and "Literal" in tail:
        return f"one of {', '.join(wanted)}"
    joint = ", or " if any("," in w for w in wanted) else " or "
    return joint.join(wanted)
