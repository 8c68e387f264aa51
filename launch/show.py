"""Show a composed run instead of starting it: `--cfg job`, and `--help` with the choices that there are."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.composing.explain import available, groups, no_such_key
from visionloom.launch.options import HELP, CommandLine


def show(config: DictConfig, options: CommandLine) -> None:
    """Print what would run, as `--cfg job` of Hydra does; with --help also how to use it.

    Raises:
        UserError: for a --package that does not exist.
    """
    shown: Any = config
    if options.package:
        shown = section(config, options.package)
    text = f"{shown}\n"  # a plain value, which --package has named
    if OmegaConf.is_config(shown):
        text = OmegaConf.to_yaml(shown, resolve=options.resolve)
    if options.help:
        text = f"{usage(options.config_dir)}\n\n{text}"
    say(text.removesuffix("\n"))


def section(config: DictConfig, package: str) -> Any:
    """Return the section, or the plain value, that --package names; UserError if there is none."""
    shown = OmegaConf.select(config, package, throw_on_missing=True)
    if shown is None:
        raise UserError(f"--package {package}: {no_such_key(package)}")
    return shown


def usage(config_dir: str) -> str:
    """Return the options of a command and the groups of recipes with their names."""
    lines = ["usage: [options] +recipe=NAME [key=value ...]", "", HELP]
    lines.append("groups, one of whose names a word chooses:")
    for group in sorted(groups()):
        lines.append(f"  {group}: {', '.join(available(group, config_dir))}")
    return "\n".join(lines)
