"""fit, validate, test, predict, export and explain on LightningCLI, through its public hooks."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import logging
import os
import shlex
import shutil
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from apps import recipes
from apps.messages import Call, Complaint, class_keys, ignored, option_name, parameters, plain
from polyhead import bundle
from polyhead.callbacks import Curves, GeneratorState, LastCheckpoint
from polyhead.data import DataModule
from polyhead.encoders import without_weights
from polyhead.errors import Terminated, UserError
from polyhead.files import write_text
from polyhead.system import System
from polyhead.trainer import PolyheadTrainer

TRAINER = Path(__file__).with_name("trainer.yaml")
FLAGS = ("resume", "overwrite", "strict")
# What a recipe may hold; the rest of a parsed configuration belongs to one call
RECIPE_KEYS = ("seed_everything", "monitor", "mode", "patience", "trainer", "model", "data", "best", "last")
# What each subcommand leaves in a run folder, relative to it
RESULTS = {
    "fit": ["config.yaml", "metrics.csv", "checkpoints", "bundle", "tensorboard"],
    "validate": ["config_validate.yaml"],
    "test": ["config_test.yaml"],
    "predict": ["config_predict.yaml", "predictions", "errors.parquet"],
    "explain": ["config_explain.yaml", "explain"],
    "export": [],
}
# What else a folder may hold that was measured of its training
MEASURED = ("metrics.json", "report.html", "config_validate.yaml", "config_test.yaml")
SUFFIX = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
# What each subcommand must find in the data before anything is written
STAGES = {"fit": "fit", "validate": "validate", "test": "test", "predict": "predict", "explain": "predict"}
# Options that something else decides
DECIDED = {"model.facts": "the data", "data.seed": "--seed_everything", "trainer.logger.save_dir": "--output"}
# Keys that say what one call does: read before any file is parsed
CALL_KEYS = ("ckpt_path", "output", "resume")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise Complaint(message) from ex


def _first_pass(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that must be known before parsing, and all others as they are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)

    def error(message: str) -> NoReturn:
        raise plain(message, call=Call(words=arguments))

    parser.error = error  # type: ignore[method-assign]
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--output")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--init_from")
    parser.add_argument("--print_config", nargs="?", const="")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", nargs="?", const="true")
    return parser.parse_known_args(arguments)


def _facts(data: DataModule) -> dict[str, Any]:
    return data.facts()


class PolyheadCLI(LightningCLI):
    """LightningCLI in subclass mode with one subcommand's parser, the shared trainer config and a run folder."""

    def __init__(self, subcommand: str, arguments: list[str]) -> None:
        self.only = subcommand
        self.words = arguments
        self.given, self.rest = _first_pass(arguments)
        self.saved: bundle.Saved | None = None
        self.resume_path: Path | None = None
        # What this call has made so far, to be taken back if it fails before there is a result
        self.made: list[Path] = []
        try:
            super().__init__(
                System,
                DataModule,
                trainer_class=PolyheadTrainer,
                parser_class=Parser,
                parser_kwargs={subcommand: {"default_config_files": [str(TRAINER)]}},
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                auto_configure_optimizers=False,
                args=[subcommand, *arguments],
            )
        except BaseException as error:
            self._take_back()
            # Lightning makes an interrupt an exit with status 1, and SIGTERM one with 0
            if isinstance(error, SIGTERMException):
                raise Terminated(*self._how_to_go_on()) from error
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(*self._how_to_go_on()) from error
            raise

    # Parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        skip = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {self.only: skip}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="runs", help="The run folder.")
        parser.add_argument("--monitor", type=str, default="val/loss", help="The metric that chooses the best weights.")
        parser.add_argument("--mode", type=str, choices=["min", "max"], default="min", help="Whether less is better.")
        parser.add_argument(
            "--patience", type=int, default=20, help="Epochs without a better value before training stops."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Curves, "curves")
        parser.add_lightning_class_args(GeneratorState, "generators")
        parser.set_defaults(
            {"best.filename": "best", "best.enable_version_counter": False, "best.auto_insert_metric_name": False}
        )
        checkpoints = lambda output: f"{output}/checkpoints"  # noqa: E731
        parser.link_arguments("output", "trainer.default_root_dir")
        parser.link_arguments("output", "best.dirpath", compute_fn=checkpoints)
        parser.link_arguments("output", "last.dirpath", compute_fn=checkpoints)
        parser.link_arguments("output", "curves.folder")
        parser.link_arguments("output", "trainer.logger.init_args.save_dir")
        for key in ("monitor", "mode"):
            parser.link_arguments(key, f"best.{key}")
            parser.link_arguments(key, f"trainer.callbacks.init_args.{key}")
        parser.link_arguments("patience", "trainer.callbacks.init_args.patience")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data", "model.init_args.facts", compute_fn=_facts, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        given = self.given
        if any(a in ("-h", "--help") or a.endswith(".help") or a.startswith("--model.help") for a in self.rest):
            parser.parse_args([self.only, *self.rest])
        configs = [recipes.find(c) for c in given.config]
        self.call = Call(self.only, self.words, configs, self._options)
        for config in configs:
            self._check_config(config)
        self._refuse_ignored()
        self._find_model()
        own = Path(given.output or ".") / "config.yaml"
        if self.resume_path is not None and not configs and given.output and own.is_file():
            configs = [own]
        self.output = Path(given.output) if given.output else self._default_output(configs)
        if self.saved is not None:
            self._take_defaults(self.saved)
        elif self.only != "fit":
            hint = "MODEL: a checkpoint, a bundle, a shipped model (`polyhead models`), or best/last with --output DIR"
            raise UserError(f"{self.only} needs trained weights: --ckpt_path MODEL", [hint])
        elif not configs and not any(a.startswith("--model") for a in self.rest):
            hint = f"`polyhead models` lists the {len(recipes.names())} shipped ones"
            raise UserError("fit needs --config RECIPE", [hint])
        arguments = [self.only]
        if self.saved is not None and self.only != "fit":
            # Before all others, and so a default, which the parser's own file would override
            arguments += [f"--seed_everything={self.saved.data.get('init_args', {}).get('seed', 0)}"]
        for config in configs:
            arguments += ["--config", str(config)]
        arguments += self.rest
        arguments += [f"--output={self.output}"]
        if given.init_from:
            arguments += [f"--init_from={given.init_from}"]
        for flag in FLAGS:
            if getattr(given, flag) is not None:
                arguments += [f"--{flag}={getattr(given, flag)}"]
        try:
            self.config = parser.parse_args(arguments)
        except Complaint as complaint:
            raise plain(str(complaint), complaint.__cause__, self.call) from complaint
        if isinstance(self.config[self.only].seed_everything, bool):
            raise UserError("--seed_everything is true or false: a whole number is needed")
        if self.saved is not None:
            self._same_class(self.saved)
        arguments_of_data = self.config[self.only].data.get("init_args") or {}
        if given.init_from and "extend" in arguments_of_data:
            # Data that number what they hold go on numbering where that model's stopped
            self.config[self.only].data.init_args.extend = given.init_from
        if self.resume_path is not None and arguments_of_data.get("extend") and self.saved is not None:
            # The numbering was made when the training began, and is in its checkpoint
            facts = self.saved.model.get("init_args", {}).get("facts") or {}
            for name, value in facts.items():
                arguments_of_data[name] = value
        if given.print_config is not None:
            self._print_config(given.print_config)

    def _print_config(self, text: str) -> NoReturn:
        """Print what a recipe would have to say, and nothing that belongs to this call alone."""
        flags = {name for name in text.split(",") if name}
        unknown = flags - {"skip_default", "skip_null"}
        if unknown:
            raise UserError(f"--print_config takes skip_default and skip_null, not {min(unknown)}")
        recipe = self._recipe(skip_none="skip_null" in flags, skip_default="skip_default" in flags)
        if "skip_default" in flags and not self.call.names("trainer.callbacks"):
            # Links write into the default ones, which then differ from what they were
            recipe.get("trainer", {}).pop("callbacks", None)
        recipe = {key: value for key, value in recipe.items() if value != {}}
        print(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)

    def _options(self) -> list[str]:
        """Every option of this subcommand, without dashes, and the arguments of the classes that recipes name."""
        names = list(self._parser(self.only).get_defaults(skip_validation=True).keys())
        found: dict[str, str] = {}
        for content in [recipes.read(path) for path in self.call.configs]:
            found |= class_keys({k: v for k, v in content.items() if k in ("model", "data")})
        names += [f"{key}.{argument}" for key, path in found.items() for argument in parameters(path)]
        return [n for n in names if not n.endswith(("class_path", "init_args"))] + ["model", "data", "config"]

    @staticmethod
    def _owners(name: str) -> list[str]:
        """The subcommands that have an option of this name."""
        signatures = {s: inspect.signature(getattr(PolyheadTrainer, s)).parameters for s in RESULTS}
        return [s for s, parameters in signatures.items() if name in parameters]

    def _check_config(self, path: Path) -> None:
        content = recipes.read(path)
        for key in CALL_KEYS:
            if key in content:
                where = f"{path}, line {recipes.line_of(path, key)}"
                raise UserError(f"{where}: {key} is no key of a recipe: give it as --{key} on the command line")

    def _refuse_ignored(self) -> None:
        """Options that parse and then have no effect."""
        for name in filter(None, map(option_name, self.words)):
            if name in DECIDED:
                raise ignored(f"--{name}", DECIDED[name])
            owners = self._owners(name)
            if owners and self.only not in owners:
                raise UserError(f"{self.only} has no option --{name}: it belongs to {' and '.join(owners)}")
        if self._flag("resume") and self._flag("overwrite"):
            raise UserError("--resume keeps what --output holds and --overwrite replaces it: give one of them")
        if self._flag("resume") and not self.given.output:
            raise UserError("--resume goes on in --output DIR, which is not given")
        if self.given.init_from and (self.given.ckpt_path or self._flag("resume")):
            other = "--ckpt_path" if self.given.ckpt_path else "--resume"
            raise UserError(f"{other} restores the weights that --init_from would set: give one of them")

    def _take_defaults(self, saved: bundle.Saved) -> None:
        """A model's settings become the defaults of this call."""
        bundle.check_classes(saved)
        self.call.defaults = str(saved.path)
        self._parser(self.only).set_defaults(self._defaults(saved))

    def _same_class(self, saved: bundle.Saved) -> None:
        """Refuse a checkpoint of another system, before its weights are compared one by one."""
        wanted = self.config[self.only].model.class_path
        found = saved.model.get("class_path")
        if wanted.rpartition(".")[2] != str(found).rpartition(".")[2]:
            raise UserError(
                f"{saved.path} holds a {found}, and {self.call.where('model')} names a {wanted}",
                ["leave --config and --model out to use its own settings"],
            )

    def _flag(self, name: str) -> bool:
        return str(getattr(self.given, name)).lower() == "true"

    def _find_model(self) -> None:
        """Read what --ckpt_path, --resume or --init_from name; their settings become the defaults."""
        given = self.given
        name = given.ckpt_path
        own = name in ("last", "best") and not Path(name).exists()
        if self.only == "fit" and self._flag("resume"):
            if name not in (None, "last"):
                raise UserError("--resume continues from last.ckpt of --output: leave --ckpt_path out")
            name, own = "last", True
        if own:
            if not given.output:
                raise UserError(f"--ckpt_path {name} means a checkpoint of --output DIR, which is not given")
            path = Path(given.output) / "checkpoints" / f"{name}.ckpt"
            if not path.is_file():
                what = "nothing to continue from" if self.only == "fit" else f"no {name} checkpoint"
                raise UserError(f"{what}: there is no {path}")
            name = str(path)
        if self.only == "fit":
            if name is not None:
                path = bundle.find(name)
                if path.is_dir() or path.suffix in SUFFIX.values():
                    raise UserError(
                        f"fit --ckpt_path continues a training and needs a Lightning checkpoint, not {name}",
                        [f"--init_from {name} starts a new training from its weights"] if path.is_dir() else [],
                    )
                self.saved, self.resume_path = bundle.read(name), path
            elif given.init_from and not given.config:
                self.saved = self._without_facts(bundle.read(given.init_from))
        elif name is not None and Path(name).suffix in SUFFIX.values():
            if self.only != "predict":
                raise UserError(f"{self.only} needs a checkpoint or a bundle; an exported file can only predict")
            self.saved = self._exported(name)
        elif name is not None:
            self.saved = bundle.read(name)

    @staticmethod
    def _exported(name: str) -> bundle.Saved:
        from polyhead.export import Exported

        meta = Exported(name).meta
        model = {"class_path": "polyhead.export.ExportedModel", "init_args": {"path": name}}
        return bundle.Saved({}, model, meta["data"], Path(name))

    @staticmethod
    def _without_facts(saved: bundle.Saved) -> bundle.Saved:
        facts = saved.model.get("init_args", {}).get("facts") or {}
        arguments = {k: v for k, v in saved.data["init_args"].items() if k not in facts}
        saved.data = {**saved.data, "init_args": arguments}
        # What validation settled is about the old classes too
        settled = ("scale", "offsets", "threshold")
        own = {k: v for k, v in saved.model.get("init_args", {}).items() if k not in settled}
        saved.model = {**saved.model, "init_args": own}
        return saved

    @staticmethod
    def _defaults(saved: bundle.Saved) -> dict[str, Any]:
        """A model's settings as defaults, less what is linked."""

        def less(recipe: dict[str, Any], name: str) -> dict[str, Any]:
            arguments = {k: v for k, v in recipe.get("init_args", {}).items() if k != name}
            return {**recipe, "init_args": arguments}

        return {"model": less(saved.model, "facts"), "data": less(saved.data, "seed")}

    def _default_output(self, configs: list[Path]) -> Path:
        # Other ranks parse the same command again and must come to the same folder
        known = os.environ.get("POLYHEAD_OUTPUT")
        if known and "LOCAL_RANK" in os.environ:
            return Path(known)
        if configs:
            name = recipes.title(configs[-1])
        else:
            name = self.saved.name if self.saved is not None else "run"
        folder = self._new_folder(Path("runs") / name / time.strftime("%Y%m%d-%H%M%S"))
        os.environ["POLYHEAD_OUTPUT"] = str(folder)
        return folder

    def _new_folder(self, path: Path) -> Path:
        """Make a folder of this name that no other call has, started in the same second though it may be."""
        if self.given.print_config is not None:
            return path
        for number in itertools.count(2):
            if self._make(path):
                break
            path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
        # The folders above may be another call's, which did not go on either
        self.made += [parent for parent in path.parents if parent not in (Path("."), *self.made)]
        return path

    def _make(self, folder: Path) -> bool:
        """Make a folder, noting what was made; False if it is there already. Raises UserError."""
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--output {folder} is a file: a folder is needed") from None
            return False
        except OSError as error:
            raise UserError(f"cannot make the folder --output {folder}: {error.strerror}") from error
        self.made += new
        return True

    # Run

    def before_instantiate_classes(self) -> None:
        config = self.config[self.only]
        self.recipe = self._recipe()
        if self._first:
            self._claim(config)
        if self.resume_path is not None:
            config.ckpt_path = str(self.resume_path)

    @property
    def _first(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    def _recipe(self, **skip: bool) -> dict[str, Any]:
        options = {"skip_link_targets": True, "skip_none": False, "format": "yaml", **skip}
        everything = yaml.safe_load(self._parser(self.only).dump(self.config[self.only], **options)) or {}
        return {k: everything[k] for k in RECIPE_KEYS if k in everything}

    def _results(self) -> list[Path]:
        """What is there of this subcommand's results."""
        names = RESULTS[self.only]
        if self.only == "export":
            names = [f"model{SUFFIX[self.config[self.only].format]}"]
        return [path for path in (self.output / name for name in names) if path.exists()]

    def _claim(self, config: Namespace) -> None:
        """Refuse a folder that holds this subcommand's results, unless told what to do with them; make it."""
        there = self._results()
        if there and config.get("overwrite"):
            self._spare([Path(n) for n in (self.given.ckpt_path, self.given.init_from) if n], there)
        elif there and not self._flag("resume") and self.resume_path is None:
            choices = "--resume or --overwrite" if self.only in ("fit", "predict") else "--overwrite"
            raise UserError(
                f"{self.output} already holds results of {self.only} ({there[0].name})",
                [f"add {choices}, or choose another --output"],
            )
        self._make(self.output)

    def _spare(self, needed: list[Path], there: list[Path]) -> None:
        for path in needed:
            if any(path.resolve().is_relative_to(old.resolve()) for old in there):
                raise UserError(f"--overwrite would delete {path}, which this call reads: choose another --output")

    def _open(self) -> None:
        """With model and data in order: old results go, and the settings of this call are written."""
        if self.config[self.only].get("overwrite"):
            measured = [self.output / name for name in MEASURED] if self.only == "fit" else []
            for path in [*self._results(), *(path for path in measured if path.exists())]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        path = self.output / ("config.yaml" if self.only == "fit" else f"config_{self.only}.yaml")
        if not path.exists():
            self.made.insert(0, path)
        write_text(path, yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True))

    def _take_back(self) -> None:
        """Leave nothing of a call that came to nothing: neither its settings nor a folder it made."""
        if not self.made:
            return
        results = [path for path in self._results() if path not in self.made] if hasattr(self, "config") else []
        for path in results:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if not any(path.exists() for path in results):
            for path in self.made:
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()

    def _how_to_go_on(self) -> list[str]:
        """The command that continues an interrupted one, where there is something to continue."""
        part = {"fit": "checkpoints/last.ckpt", "predict": "errors.parquet"}.get(self.only)
        if part is None or not (self.output / part).exists():
            return []
        words = [word for word in self.words if self.only == "predict" and word not in ("--overwrite", "--resume")]
        output = [] if self.given.output and words else ["--output", str(self.output)]
        return [f"go on with: polyhead {shlex.join([self.only, *words, *output])} --resume"]

    def instantiate_classes(self) -> None:
        # A network whose weights are loaded next needs no pretrained ones
        loaded = self.saved is not None and (self.only != "fit" or self.resume_path is not None)
        try:
            with without_weights() if loaded else nullcontext():
                super().instantiate_classes()
        except UserError:
            raise
        except Exception as error:
            raise plain(str(error), error) from error

    def after_instantiate_classes(self) -> None:
        model, data = self.model, self.datamodule
        facts = data.facts()
        model.recipe = _with(self.recipe["model"], {"facts": facts})
        # Which parts were drawn depends on the seed: a test must not draw others
        model.data_recipe = _with(self.recipe["data"], {**facts, "seed": data.seed})
        data.recipe = model.data_recipe
        trainer: Any = self.trainer
        trainer.command = "polyhead " + shlex.join([self.only, *self.words])
        trainer.config_text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        if self.resume_path is not None:
            self._same_facts(facts)
        if self.saved is not None and self.saved.state and (self.only != "fit" or self.resume_path is not None):
            bundle.load_weights(model, self.saved)
        if self.given.init_from:
            trainer.start_from(model, self.given.init_from)
            self.config_init[self.only].init_from = None
        if self.only in STAGES:
            data.setup(STAGES[self.only])
        if self.only == "fit" and self.resume_path is None and not self.given.init_from:
            model.begin(data)
        if self._first:
            self._open()

    def _same_facts(self, facts: dict[str, Any]) -> None:
        """Refuse to go on with a training on data that say something else than when it began."""
        saved: Any = self.saved
        before = saved.model.get("init_args", {}).get("facts") or {}
        changed = [k for k, v in facts.items() if k in before and json.dumps(v) != json.dumps(before[k])]
        if changed:
            raise UserError(
                f"the data have changed since {saved.path} was written (their {' and '.join(changed)}): "
                "a training goes on with what it began with",
                [f"--init_from {saved.path} starts a new one from its weights"],
            )


def _with(recipe: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "init_args": {**recipe.get("init_args", {}), **arguments}}


def quiet() -> None:
    """Lightning's hints about hardware and other products are not about the person's run."""
    for name in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torchmetrics|jsonargparse|torchdata")
    for text in (".*does not have many workers.*", ".*isinstance.*LeafSpec.*", ".*non-full backward hook.*"):
        warnings.filterwarnings("ignore", message=text)


def run(subcommand: str, arguments: list[str]) -> int:
    """Run one of Lightning's subcommands or ours on its Trainer."""
    quiet()
    try:
        PolyheadCLI(subcommand, arguments)
    except MisconfigurationException as error:
        raise plain(str(error).partition("HINT")[0], error) from error
    return 0


class _Parsed(Exception):
    """Parsing succeeded; holds the recipe."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe


class _ParseOnly(PolyheadCLI):
    def _new_folder(self, path: Path) -> Path:
        return path

    def before_instantiate_classes(self) -> None:
        raise _Parsed(self._recipe())


def read_recipe(arguments: list[str]) -> dict[str, Any]:
    """The recipe that `fit ARGUMENTS` would run, with nothing built. Raises UserError."""
    quiet()
    try:
        _ParseOnly("fit", arguments)
    except _Parsed as parsed:
        return parsed.recipe
    raise AssertionError("parsing did not end")
