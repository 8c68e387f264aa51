"""Read a SigLIP or SigLIP 2 vision tower as that of a Qwen3-VL model, as the report starts from SigLIP 2.

Blocks are alike but for names and for queries, keys and values, which are joint here. A patch has two frames here, which a
picture fills with itself: each frame gets half of the weight. The square table of learned positions is resized as Qwen3-VL
reads one for a picture's size. Rotations are new, and what comes after the blocks (a norm, a head) is left alone.
Source: Qwen3-VL technical report (arXiv 2511.21631) section 2; reference implementations: transformers' SiglipVisionModel and
Siglip2VisionModel.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from visionloom.model.config import ModelConfig, VisionConfig
from visionloom.model.huggingface.names import PATCH_EMBEDDING
from visionloom.model.huggingface.part_config import read_tower_config
from visionloom.model.huggingface.shapes import Shape, parameter_shapes
from visionloom.model.huggingface.tensor_files import TensorFiles
from visionloom.model.trainable import group_of

POSITIONS: Final = "visual.pos_embed.weight"
BLOCKS: Final = "visual.blocks."
OUTER: Final = "vision_model."
"""How the tower's names begin, but not in all folders."""
BLOCK_NAMES: Final = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
JOINT: Final = "attn.qkv"
LEFT_ALONE: Final = ("post_layernorm.", "head.")
OTHER_PARTS: Final = ("text_model.", "logit_scale", "logit_bias")


class SiglipFolder:
    """The tower of a SigLIP folder; the files stay open and are read where a region asks for it."""

    def __init__(self, folder: Path, option: str, model: ModelConfig) -> None:
        """Read config.json and the headers of all files; the arguments are those of HuggingFaceFolder.

        Raises:
            UserError: if the folder is no SigLIP model, or its tensors are not those of its config.json.
        """
        theirs = read_tower_config(folder, option, model).vision
        self.side = theirs.position_table
        # The table has the side that the model wants.
        self.config = replace(
            model, vision=replace(theirs, position_table=model.vision.position_table)
        )
        self.files = TensorFiles(folder, option)
        has_outer = any(name.startswith(OUTER) for name in self.files.names)
        self.outer = OUTER if has_outer else ""
        self._parameters: dict[str, Shape] = {}
        for name, shape in parameter_shapes(self.config).items():
            if group_of(name) == "vision":
                self._parameters[name] = shape
        self._check()

    def _check(self) -> None:
        """Compare the tensors of the files with those that config.json describes; UserError with all that is wrong."""
        alone = (*(self.outer + name for name in LEFT_ALONE), *OTHER_PARTS)
        left_alone = [name for name in self.files.names if name.startswith(alone)]
        self.files.check(self._expected(), left_alone)

    def covers(self, name: str) -> bool:
        """Return whether the folder has one of our parameters, by its canonical name."""
        return name in self._parameters

    def parameter(self, name: str, region: Sequence[slice]) -> Tensor:
        """Read a region of one of our parameters."""
        if name == POSITIONS:
            return self._positions()[tuple(region)]
        if name == PATCH_EMBEDDING:
            return self._patch_embedding(region)
        parts = self._parts(name)
        if len(parts) == 1:
            return self.files.read(parts[0], region)
        # Queries, keys and values, one above the other.
        joint = torch.cat([self.files.read(part, []) for part in parts])
        return joint[tuple(region)]

    def _parts(self, name: str) -> list[str]:
        """Return the tensors that one of our parameters is made of, one above the other."""
        module, _, kind = name.rpartition(".")
        if not name.startswith(BLOCKS):
            embedding = "position" if name == POSITIONS else "patch"
            return [f"{self.outer}embeddings.{embedding}_embedding.{kind}"]

        number, _, module = module.removeprefix(BLOCKS).partition(".")
        layer = f"{self.outer}encoder.layers.{number}."
        if module == JOINT:
            return [f"{layer}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        return [f"{layer}{BLOCK_NAMES[module]}.{kind}"]

    def _expected(self) -> dict[str, Shape]:
        """Return the shape of every tensor that is read."""
        vision = self.config.vision
        shapes: dict[str, Shape] = {}
        for name, shape in self._parameters.items():
            parts = self._parts(name)
            if name == POSITIONS:
                shape = (self.side**2, vision.hidden_size)
            elif name == PATCH_EMBEDDING:
                shape = self._patch_shape(parts[0], vision)
            rows = shape[0] // len(parts)
            shapes |= dict.fromkeys(parts, (rows, *shape[1:]))
        return shapes

    def _patch_shape(self, name: str, vision: VisionConfig) -> Shape:
        """Return the shape of the patch embedding: a convolution's in SigLIP, a matrix in SigLIP 2."""
        width, channels, patch = vision.hidden_size, vision.channels, vision.patch_size
        is_matrix = name in self.files and len(self.files.shape(name)) == 2
        return (width, patch * patch * channels) if is_matrix else (width, channels, patch, patch)

    def _patch_embedding(self, region: Sequence[slice]) -> Tensor:
        """Return a region of [width, channels x frames x height x width of a patch]."""
        vision = self.config.vision
        (name,) = self._parts(PATCH_EMBEDDING)
        weight = self.files.read(name, region[:1])
        if weight.dim() == 2:
            # Rows, columns and channels of a patch, the last the fastest.
            pixels = (vision.patch_size, vision.patch_size, vision.channels)
            weight = weight.unflatten(1, pixels).permute(0, 3, 1, 2)
        frames = vision.temporal_patch_size
        shared = (weight / frames).unsqueeze(2).expand(-1, -1, frames, -1, -1)
        return shared.flatten(1)[:, region[1]]

    def _positions(self) -> Tensor:
        """Return the table of positions with the side that the model wants [side x side, width]."""
        (name,) = self._parts(POSITIONS)
        table = self.files.read(name, [])
        wanted = self.config.vision.position_table
        if wanted == self.side:
            return table
        squares = table.float().T.unflatten(1, (self.side, self.side))
        # Corners stay corners, as Qwen3-VL reads its table for a picture of another size.
        resized = F.interpolate(
            squares[None], (wanted, wanted), mode="bilinear", align_corners=True
        )
        return resized[0].flatten(1).T.to(table.dtype)
