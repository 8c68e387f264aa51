"""Recipes as files that strangers wrote: values only, within bounds, and nothing outside of their folder.

Hydra reads every recipe through `RecipeSource`, so what a file may hold is decided here and nowhere else. Hydra alone would
follow `../`, let a recipe configure Hydra itself (callbacks, launchers, search paths, the environment), and expand aliases,
references and includes without end.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.common.text import one_line
from visionloom.launch.composing.words import whole

LARGEST: Final = 1 << 17
"""Bytes of a recipe: 128 KiB, some thirty times our largest; YAML is read at about 100 KiB a second."""
NODES: Final = 10_000
"""Values and keys of all files of a run together, each as often as it is included or referred to by a YAML alias."""
INCLUDE_NODES: Final = 100
"""What an include costs at least, so that they end: a hundred at most."""
REFERENCES: Final = 32
"""References to other values (`${run.name}`) in all files of a run together: each may stand for a whole section."""
DEEPEST: Final = 12
"""Sections inside sections; the schema has five."""
NUMBER: Final = 40
"""Characters of a number."""
PLAIN: Final = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
FLOAT, WHOLE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
RESERVED: Final = tuple((name + end,) for name in ("hydra", "schema") for end in ("", ".yaml"))
"""Names of Hydra's own groups, and of the schema that gives every option its type: no file stands in for them."""
CODE: Final = re.compile(r"_[a-z]+_")
"""Keys by which Hydra finds something to call: _target_, _partial_, _args_ and others."""
HYDRA: Final = re.compile(r"(?:^|[\s/@.:])hydra(?:$|[/@.:])")
VARIABLE: Final = re.compile(r"\$\{oc\.env:VISIONLOOM_[A-Z0-9_]+(?:,[^${}]*)?\}")
REFERENCE: Final = re.compile(r"\$\{\.*[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\}")


@dataclass
class RecipeBudget:
    """What the files of one composition may still take up."""

    nodes: int = NODES
    references: int = REFERENCES

    def include(self, path: str, nodes: int) -> None:
        """Count a file that is included once more."""
        self.nodes -= max(nodes, INCLUDE_NODES)
        if self.nodes < 0:
            raise UserError(
                f"{path} and what it includes hold more than {NODES} values, or include each other without end:"
                " leave out what is there twice"
            )


class _Recipe(ConfigResult):
    """A file as Hydra holds it: each time that Hydra asks what it includes is one more include."""

    nodes: int
    budget: RecipeBudget
    _includes: Any = None

    @property
    def defaults_list(self) -> Any:
        if self._includes is not None:
            self.budget.include(self.path, self.nodes)
        return self._includes

    @defaults_list.setter
    def defaults_list(self, includes: Any) -> None:
        self._includes = includes


class RecipeSource(ConfigSource):
    """A folder of recipes: `recipes:///path/of/it`."""

    budget = RecipeBudget()
    """Of the composition that is under way; `begin` starts another one."""

    @classmethod
    def begin(cls) -> None:
        """Start a composition."""
        cls.budget = RecipeBudget()

    @staticmethod
    def scheme() -> str:
        """Return what the search path names this source by."""
        return "recipes"

    def available(self) -> bool:
        """Return whether the folder is there."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Return whether there is a folder of this name."""
        return self._is("folder", config_path or ".")

    def is_config(self, config_path: str) -> bool:
        """Return whether there is a recipe of this name."""
        return self._is("file", self._normalize_file_name(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List names in a group, for what Hydra says about wrong ones; explain.py says it instead."""
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a recipe; raises UserError, naming the file and the line, for what no recipe may hold."""
        name = self._normalize_file_name(config_path)
        path = f"{self.path}/{name}"
        text, header = self._text(name)
        # `# @package hydra.run` would put the file's values into Hydra's own settings.
        if HYDRA.search(header.get("package") or ""):
            raise UserError(
                f"{path}: package {header['package']} is refused: a recipe cannot configure Hydra"
            )
        nodes, values = _Check(path, self.budget).read(text)
        try:
            recipe = _Recipe(self.provider, path, OmegaConf.create(values), header)
        except OmegaConfBaseException as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
        recipe.nodes, recipe.budget = nodes, self.budget
        return recipe

    def _text(self, name: str) -> tuple[str, dict[str, str | None]]:
        """Return the text of a file and what its first comments say to Hydra; UserError if it cannot be read."""
        path = f"{self.path}/{name}"
        try:
            # utf-8-sig: editors of Windows put a mark first.
            text = read_located(Path(self.path), name, LARGEST).decode("utf-8-sig")
            # The header is the first line or two; Hydra reads no more of it either.
            return text, self._get_header_dict(text[:512])
        except PlaceError as error:
            raise UserError(f"{path} {error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    def _is(self, kind: Any, name: str) -> bool:
        # Before looking: a file of that name would stand in for Hydra's own.
        if Path(name).parts[:1] in RESERVED:
            return False
        try:
            locate(Path(self.path), name, kind)
        except PlaceError as error:
            raise UserError(f"{self.path}/{name} {error}") from None
        except OSError:
            return False
        return True


@dataclass
class _Check:
    """The rules for one file."""

    path: str
    budget: RecipeBudget
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Values below a node by its id, aliases counted each time, and the sections inside sections."""
    entered: set[int] = field(default_factory=set)
    """Nodes that are being looked at: an alias to one of them leads in a circle."""

    def read(self, text: str) -> tuple[int, Any]:
        """Return the number of values in a file's YAML, and they themselves, once the rules let them pass."""
        try:
            # OmegaConf's own loader: what counts as a number differs from yaml.SafeLoader's.
            loader = get_yaml_loader()(text)
            root = loader.get_single_node()
            if root is None:
                return 0, {}
            return self.file(root), loader.construct_document(root)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{self.path}, line {line}: not valid YAML: {error.problem}") from None
        except RecursionError:
            raise UserError(f"{self.path}: nested too deeply") from None
        except UserError:
            raise  # it is a ValueError, which the next line would take for YAML's
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{self.path}: not valid YAML: {str(error).splitlines()[0]}") from None

    def file(self, root: yaml.Node) -> int:
        """Return the number of values in a file that holds nothing but values."""
        if not isinstance(root, yaml.MappingNode):
            self.refuse(root, "a recipe is a section of `key: value` lines")
        for key, _ in root.value:
            if key.tag.endswith(":merge"):  # it could bring what is looked for below
                self.refuse(
                    key,
                    "<< is refused beside the sections of a recipe: include another recipe in `defaults`",
                )
            if HYDRA.match(str(key.value)):
                self.refuse(
                    key,
                    f"{key.value} is refused: a recipe holds values of the run, it cannot configure Hydra",
                )
        nodes, _ = self.node(root)
        for key, value in root.value:
            if key.value == "defaults":
                self.includes(value)
        return nodes

    def includes(self, value: yaml.Node) -> None:
        """Refuse includes that lead to Hydra's own groups, or that only a run would know."""
        for entry in _scalars(value, DEEPEST):
            if HYDRA.search(entry.value):
                self.refuse(
                    entry,
                    f"{entry.value} is refused: a recipe cannot include what configures Hydra",
                )
            if "${" in entry.value or "://" in entry.value:
                self.refuse(
                    entry, f"{entry.value} is refused: a recipe includes others by name only"
                )

    def node(self, node: yaml.Node, depth: int = 1) -> tuple[int, int]:
        """Count the values in and below a node, and its sections inside sections."""
        known = self.sizes.get(id(node))
        if id(node) in self.entered or depth + (known[1] if known else 0) > DEEPEST:
            self.refuse(node, f"more than {DEEPEST} sections inside each other")
        if known is None:
            self.entered.add(id(node))
            # Kept by node: an alias costs nothing to count, however often it stands there.
            known = self.sizes[id(node)] = self.measure(node, depth)
            self.entered.discard(id(node))
        if known[0] > NODES:
            self.refuse(node, f"more than {NODES} values, aliases counted each time")
        return known

    def measure(self, node: yaml.Node, depth: int) -> tuple[int, int]:
        """Do as `node`, of one that was not looked at before."""
        if node.tag not in PLAIN:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.refuse(node, f"{tag} is refused: a recipe holds plain values only")
        if isinstance(node, yaml.ScalarNode):
            self.scalar(node)
            return 1, 0
        values = 1
        deepest = 0
        for child in _children(node):
            below, height = self.node(child, depth + 1)
            values += below
            deepest = max(deepest, height)
        if isinstance(node, yaml.MappingNode):
            self.keys(node)
        return values, deepest + 1

    def keys(self, node: yaml.MappingNode) -> None:
        """Refuse keys that are no names, or name something to call."""
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(key, "a key must be a name")
            if CODE.fullmatch(key.value):
                why = f"{key.value} is refused: a recipe holds values, it cannot name code to call"
                self.refuse(key, why)

    def scalar(self, node: yaml.ScalarNode) -> None:
        """Read 15e12 as the whole number it is; refuse endless numbers, and references that lead elsewhere."""
        if not node.tag.endswith(":str") and len(node.value) > NUMBER:
            self.refuse(node, f"a number of {len(node.value)} characters")
        if node.tag == FLOAT and (number := whole(node.value)) is not None:
            node.tag, node.value = WHOLE, str(number)  # which fits an option of either kind
        if "${" in node.value:
            self.references(node)

    def references(self, node: yaml.ScalarNode) -> None:
        """Refuse references to other things than values, and more of them than a run may have."""
        rest, _ = VARIABLE.subn("", node.value)
        # One reference a text: with two, each text that refers to another would double its length.
        rest, references = REFERENCE.subn("", rest)
        self.budget.references -= references
        if "${" in rest or references > 1:
            self.refuse(
                node,
                f"{node.value} is refused: a recipe may refer to one other value, as ${{run.name}}, and to variables of the"
                " environment named VISIONLOOM_*",
            )
        if self.budget.references < 0:
            self.refuse(node, f"more than {REFERENCES} references to other values")

    def refuse(self, node: yaml.Node, why: str) -> NoReturn:
        """Raise UserError for what stands at a node."""
        raise UserError(one_line(f"{self.path}, line {node.start_mark.line + 1}: {why}"))


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    # The value of a mapping is a list of pairs, that of a sequence a list of nodes.
    for child in node.value:
        yield from child if isinstance(child, tuple) else (child,)


def _scalars(node: yaml.Node, depth: int) -> Iterator[yaml.ScalarNode]:
    """Yield the texts of a defaults list, keys included; deeper ones are refused with the whole file."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif depth:
        for child in _children(node):
            yield from _scalars(child, depth - 1)
