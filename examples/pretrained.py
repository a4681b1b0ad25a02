"""Bring your own recognizer: MoViNet-A0 (Kinetics-600) for actions, MobileNetV2 (ImageNet) for attributes.

    penaltyanon sweep --preset mini --action-model examples/pretrained.py:movinet_a0 ...

A builder takes the number of outputs and returns a module: clips (n, 3, t, h, w) or frames (n, 3, h, w), RGB in
[0, 1], to logits. The weight files are read from the folder PENALTYANON_WEIGHTS.
"""
import torch
import torch.nn as nn
from einops import rearrange
from torchvision.models import mobilenet_v2

from penaltyanon.core.files import UserError
from penaltyanon.nets.recognizers import load_builder
from penaltyanon.nets.weights import weights_folders


def weights_file(name):
    for folder in weights_folders():
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name}: no such weights file; set PENALTYANON_WEIGHTS to the folder that holds it")


class MoViNet(nn.Module):
    """MoViNet-A0 with a fresh linear head; trained at 172 px, 5 frames a second."""

    dim = 2048

    def __init__(self, classes):
        super().__init__()
        build = load_builder(f"{weights_file('movinet_a0_torch.py')}:MoViNetA0Stream")
        self.net = build(str(weights_file("movinet_a0_k600_dequant.npz")))
        # the last Kinetics layer is never used: only what lies before the 2048 features can learn
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(self.dim, classes)

    def features(self, x):
        return self.net(rearrange(x, "n c t h w -> n t c h w"), features=True)

    def forward(self, x):
        return self.head(self.drop(self.features(x)))


class MobileNet(nn.Module):
    """MobileNetV2 with a fresh linear head; its BatchNorm is folded into the convolutions."""

    dim = 1280

    def __init__(self, outputs):
        super().__init__()
        net = mobilenet_v2(num_classes=1001)
        path = weights_file("mobilenet_v2_tf2ptq_dequant_torchvision.pth")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
        self.net, self.head = net.features.eval(), nn.Linear(self.dim, outputs)

    def train(self, mode=True):
        super().train(mode)
        self.net.eval()  # folded statistics stay folded
        return self

    def features(self, x):
        return self.net(2 * x - 1).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def movinet_a0(classes: int) -> nn.Module:
    """An f_T for `--action-model examples/pretrained.py:movinet_a0`."""
    return MoViNet(classes)


def mobilenet(outputs: int) -> nn.Module:
    """An f_B for `--set privacy_model=examples/pretrained.py:mobilenet`."""
    return MobileNet(outputs)
