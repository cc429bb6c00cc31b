"""The diffusion transformers, UNets and convolutional nets of the zoo (diffusers, torchvision)."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo_models import Build, Entry, Inputs

if TYPE_CHECKING:
    import torch

BATCH = 2
TORCHVISION = "0.28.0"  # the release that goes with torch 2.13

UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1,
    "attention_head_dim": 8, "cross_attention_dim": 24, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def _noise(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    import torch

    return lambda generator: torch.randn(BATCH, *shape, generator=generator)


def _unet() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import torch
    from diffusers import UNet2DConditionModel

    def draw(g: torch.Generator) -> Inputs:
        return {
            "sample": _noise(4, 8, 8)(g),
            "timestep": torch.tensor([3, 700]),
            "encoder_hidden_states": _noise(6, 24)(g),
        }

    return UNet2DConditionModel(**UNET), draw


def _dit() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import torch
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=16, norm_num_groups=4,
    )  # fmt: skip
    return module, lambda g: {
        "hidden_states": _noise(4, 8, 8)(g), "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 5]),
    }  # fmt: skip


def _pixart() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import torch
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=24, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    return module, lambda g: {
        "hidden_states": _noise(4, 8, 8)(g), "encoder_hidden_states": _noise(6, 24)(g), "timestep": torch.tensor([3,
            700]),
    }  # fmt: skip


def _flux() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import torch
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def draw(g: torch.Generator) -> Inputs:
        return {
            "hidden_states": _noise(16, 4)(g), "encoder_hidden_states": _noise(6, 24)(g),
            "pooled_projections": _noise(20)(g), "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1),
            "txt_ids": torch.zeros(6, 3),
        }  # fmt: skip

    return module, draw


def _sd3() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    import torch
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return module, lambda g: {
        "hidden_states": _noise(4, 8, 8)(g), "encoder_hidden_states": _noise(6, 24)(g),
        "pooled_projections": _noise(20)(g), "timestep": torch.tensor([3, 700]),
    }  # fmt: skip


def _vae() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
    from diffusers import AutoencoderKL

    module = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D",
            "UpDecoderBlock2D"),
    )  # fmt: skip
    return module, lambda g: {"sample": _noise(3, 16, 16)(g)}


def import_torchvision() -> Any:
    """torchvision, beside any build of torch: fetched without dependencies into the cache where it is missing.

    Its compiled ops may not load beside a CPU build of torch. Its nets do not use them; the two that its
    import asks for are declared, and stay without a kernel.
    """
    import torch

    if importlib.util.find_spec("torchvision") is None:
        cache = Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish")
        folder = cache / f"torchvision-{TORCHVISION}"
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*command, "--target", str(folder), f"torchvision=={TORCHVISION}"], check=True)
        sys.path.append(str(folder))
    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _DECLARED.append(library := torch.library.Library("torchvision", "DEF"))
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_DECLARED: list[Any] = []  # a torch.library.Library lives as long as someone holds it

SMALL = {"num_classes": 10}


def _vgg(models: Any) -> torch.nn.Module:
    from torch import nn

    features = models.vgg.make_layers([16, "M", 32, "M", 32, 32, "M"], batch_norm=True)
    net = models.VGG(features, init_weights=False, **SMALL)
    net.avgpool, net.classifier = (
        nn.AdaptiveAvgPool2d(2),
        nn.Sequential(nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10)),
    )
    return net  # type: ignore[no-any-return]


NETS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "resnet18": lambda m: m.resnet18(**SMALL),
    "resnext": lambda m: m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=8, **SMALL),
    "mobilenet-v3": lambda m: m.mobilenet_v3_small(**SMALL),
    "efficientnet-b0": lambda m: m.efficientnet_b0(**SMALL),
    "convnext-plain": lambda m: m.ConvNeXt(
        [m.convnext.CNBlockConfig(16, 32, 1), m.convnext.CNBlockConfig(32, None, 2)], **SMALL
    ),
    "vgg-bn": _vgg,
    "densenet": lambda m: m.DenseNet(8, (2, 2, 2, 2), 16, **SMALL),
    "shufflenet": lambda m: m.shufflenet_v2_x0_5(**SMALL),
    "squeezenet": lambda m: m.squeezenet1_1(**SMALL),
    "mnasnet": lambda m: m.mnasnet0_5(**SMALL),
    "regnet-y": lambda m: m.regnet_y_400mf(**SMALL),
    "googlenet": lambda m: m.googlenet(init_weights=False, aux_logits=False, **SMALL),
    "maxvit": lambda m: m.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, **SMALL,
    ),
}  # fmt: skip


def _net(make_net: Callable[[Any], torch.nn.Module]) -> Build:
    def make() -> tuple[torch.nn.Module, Callable[[torch.Generator], Inputs]]:
        module = make_net(import_torchvision().models)
        return module, lambda g: {next(iter(inspect.signature(module.forward).parameters)): _noise(3, 32, 32)(g)}

    return make


def entries() -> Iterator[Entry]:
    """The models of this file."""
    for name, make in {
        "unet-2d-condition": _unet, "dit": _dit, "pixart": _pixart, "flux": _flux, "sd3": _sd3, "autoencoder-kl": _vae,
    }.items():  # fmt: skip
        yield Entry(name, "diffusion", make)
    for name, make_net in NETS.items():
        yield Entry(name, "conv", _net(make_net))
