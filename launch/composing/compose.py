"""Let Hydra compose a run of the recipes and the words of a command line."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from visionloom.common.errors import UserError
from visionloom.launch.composing.explain import explain
from visionloom.launch.composing.recipe_files import RecipeSource
from visionloom.train.config import RunConfig


def compose_words(words: Sequence[str], config_dir: str) -> DictConfig:
    """Let Hydra read the recipes and the command line.

    Only its compose API is used: nothing in a configuration makes it call, write or set anything.
    """
    RecipeSource.begin()
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("visionloom", _search_path(config_dir))
    try:
        return hydra_compose("config", list(words))
    except UserError:
        raise
    except Exception as error:
        # Hydra only reads the user's input here, and fails on odd input with errors of any type.
        raise UserError(explain(error, config_dir)) from error
    finally:
        GlobalHydra.instance().clear()


def _search_path(config_dir: str) -> ConfigSearchPathImpl:
    """Tell Hydra where recipes and schema are; UserError if the user's folder of recipes is not there."""
    # Hydra's behaviour of that release, whichever is installed.
    version.setbase("1.3")
    ConfigStore.instance().store(name="schema", node=RunConfig)
    Plugins.instance()
    SourcesRegistry.instance().register(RecipeSource)
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    path.append("main", f"recipes://{files('visionloom.recipes')}")
    if config_dir:
        if not Path(config_dir).is_dir():
            raise UserError(
                f"--config-dir {config_dir} is not found: name a folder with recipe/NAME.yaml in it"
            )
        path.append("command line", f"recipes://{Path(config_dir).absolute()}")
    # Last, as Hydra's own command line has it.
    path.append("schema", "structured://")
    return path
