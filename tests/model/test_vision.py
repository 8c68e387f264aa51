"""The vision tower in pieces against the same tower at once, fp32."""

import pytest
import torch

from visionloom.model import vision
from visionloom.model.vision import VisionInput, VisionTower
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import tiny_config

GRIDS = [[1, 4, 4], [3, 2, 4], [1, 8, 6], [1, 2, 2]]
"""Frames of 16, 8, 8, 8, 48 and 4 patches."""
OUTPUT = 32


def tower_input(device: torch.device) -> VisionInput:
    config = tiny_config().vision
    grids = torch.tensor(GRIDS)
    patches = torch.randint(
        0, 256, (int(grids.prod(1).sum()), config.patch_width), dtype=torch.uint8
    )
    return VisionInput.build(patches, grids, config, device)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(24, [24, 16, 48, 4]), (16, [16, 16, 8, 48, 4]), (92, [92]), (1, [16, 8, 8, 8, 48, 4])],
)
def test_pieces_are_whole_frames(
    monkeypatch: pytest.MonkeyPatch, most: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(vision, "PIECE_PATCHES", most)
    whole = tower_input(torch.device("cpu"))
    pieces = list(whole.pieces())
    assert [len(piece.patches) for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece.patches for piece in pieces]), whole.patches)
    lengths = [length for piece in pieces for length in piece.segments.cu_seqlens_q.diff().tolist()]
    assert lengths == whole.segments.cu_seqlens_q.diff().tolist() == [16, 8, 8, 8, 48, 4]


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, topology: Topology) -> None:
    """Features and gradients of a recomputed tower; as a control, the number of pieces that were encoded."""
    torch.manual_seed(0)
    tower = VisionTower(tiny_config().vision, OUTPUT, recompute="full").to(topology.device)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole = tower_input(topology.device)
    encoded: list[int] = []
    encode = tower._encode

    def counted(piece: VisionInput, *is_again: bool) -> torch.Tensor:
        encoded.append(len(piece.patches))
        return encode(piece, *is_again)

    monkeypatch.setattr(tower, "_encode", counted)

    def features_and_gradients(most: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(vision, "PIECE_PATCHES", most)
        tower.zero_grad()
        features = tower(whole)
        (
            features * torch.linspace(-1, 1, features.numel()).view_as(features).to(features)
        ).sum().backward()
        return features.detach(), [parameter.grad.clone() for parameter in tower.parameters()]

    at_once, in_pieces = features_and_gradients(1000), features_and_gradients(24)
    # Forward, and again in the backward pass, whose pieces come in any order.
    assert sorted(encoded) == sorted([92, *[24, 16, 48, 4] * 2])
    torch.testing.assert_close(in_pieces[0], at_once[0], rtol=1e-5, atol=1e-6)
    for own, other in zip(in_pieces[1], at_once[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
