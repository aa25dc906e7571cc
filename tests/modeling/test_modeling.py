import copy

import pytest
import torch
from conftest import make_batch, retinanet_with_gn
from detectron2 import model_zoo as d2_model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.utils.events import EventStorage

from gnws_d2 import model_zoo
from gnws_d2.export.formats import _remove_other_keys
from gnws_d2.layers import (
    GroupNorm,
    WSConv2d,
    convert_ws_conv,
    fold_for_inference,
    standardize_weight,
)
from gnws_d2.modeling import checkpoint_activations
from gnws_d2.utils.errors import UserError


def get_config(name="mask_rcnn_R50_gnws_2x"):
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.GNWS.SCRATCH_INIT = False  # with random weights, all blocks should matter
    return cfg


def train_step(model, batch):
    """Losses, with gradients left in the parameters. Proposals are sampled with a fixed seed."""
    torch.manual_seed(0)
    with EventStorage():
        losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    return losses


def test_only_the_heads_are_folded_to_channels_last():
    """It changes the rounding; it is faster on a CPU."""
    folded = fold_for_inference(build_model(get_config()))
    weights = folded.backbone.fpn_output2.weight, folded.roi_heads.box_head.conv1.weight
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]


def test_backbone_can_be_traced():
    """As Detectron2's can, for instance by fvcore's counts of operations."""
    torch.manual_seed(0)
    backbone = build_backbone(get_config()).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.trace(backbone, x, strict=False)(x), backbone(x))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_activation_checkpointing_keeps_gradients_and_saves_memory(kernels):
    cfg = get_config("quick_start")
    cfg.MODEL.GNWS.KERNELS = kernels
    x = torch.randn(2, 3, 96, 96)
    grads, sizes = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(cfg)
        if recompute:
            checkpoint_activations(backbone)
        backbone = copy.deepcopy(backbone)  # as evaluation does
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel() * (tensor.shape[0] == 2)  # activations
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(f.square().sum() for f in backbone(x).values())
        loss.backward()
        grads.append([p.grad for p in backbone.parameters()])
        sizes.append(saved)
        with torch.no_grad():
            backbone(x)
    assert len(grads[0]) > 100 and all(map(torch.equal, *grads))
    assert sizes[1] < 0.5 * sizes[0]


def test_unknown_kernels_are_refused():
    cfg = get_config()
    cfg.MODEL.GNWS.KERNELS = "fast"
    choices = '"auto" or "triton" or "torch" or "reference"'
    with pytest.raises(UserError, match=f'KERNELS is "fast": set it to {choices}'):
        build_model(cfg)


@pytest.mark.parametrize("kernels", ["auto", "triton", "torch", "reference"])
def test_all_layers_have_the_kernels_of_the_config(kernels):
    cfg = get_config()
    cfg.MODEL.GNWS.KERNELS = kernels
    modules = build_model(cfg).modules()
    assert {m.kernels for m in modules if isinstance(m, (GroupNorm, WSConv2d))} == {kernels}


def test_stock_config_without_our_keys_builds():
    cfg = model_zoo.get_config("faster_rcnn_R50_gnws_1x")
    _remove_other_keys(cfg, get_cfg())
    cfg.MODEL.DEVICE = "cpu"
    assert "GNWS" not in cfg.MODEL and "MIN_LOW_QUALITY_IOU" not in cfg.MODEL.RPN
    assert any(isinstance(m, WSConv2d) for m in build_model(cfg).modules())


def test_autocast_keeps_the_features_in_half_precision():
    model = build_model(get_config())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(torch.randn(1, 3, 64, 64))
    assert {f.dtype for f in features.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["build_resnet_gnws_backbone", "build_resnet_gnws_fpn_backbone"])
@pytest.mark.parametrize("depth", [18, 50])
def test_residual_blocks_start_as_the_identity(name, depth):
    cfg = get_config()
    cfg.MODEL.GNWS.SCRATCH_INIT, cfg.MODEL.WEIGHTS = True, ""
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    backbone = BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
    resnet = backbone if "fpn" not in name else backbone.bottom_up
    x = torch.rand(2, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, 8, 8)
    identity, *_ = [block for block in resnet.res2 if block.shortcut is None]
    assert torch.equal(identity(x), x)
    for block in (block for stage in resnet.stages for block in stage):
        norms = [m.norm.weight for m in block.modules() if isinstance(m, WSConv2d)]
        assert sum(not w.any() for w in norms) == 1


@pytest.mark.parametrize("weights", ["", "backbone.pth"])
def test_mask_predictor_starts_as_mmdetections_without_weights_and_else_as_detectron2s(weights):
    """MMDetection: ``kaiming_init``, by the number of outputs; Detectron2: 0.001."""
    cfg = get_config()
    cfg.MODEL.GNWS.SCRATCH_INIT, cfg.MODEL.WEIGHTS = True, weights
    predictor = build_model(cfg).roi_heads.mask_head.predictor
    deviation = 0.001 if weights else (2 / 80) ** 0.5
    assert predictor.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert not predictor.bias.any()


@pytest.mark.parametrize("section", ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_another_norm_is_refused(section):
    cfg = get_config()
    cfg.MODEL[section].NORM = "BN"
    with pytest.raises(UserError, match=rf'MODEL.{section}.NORM is "BN".*MODEL.{section}.NORM GN'):
        build_model(cfg)


def test_training_step_equals_plain_group_norm_with_standardized_weights():
    """The reference is Detectron2's own Mask R-CNN, its weights standardized beforehand."""
    cfg = get_config()
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    torch.manual_seed(0)
    model = build_model(cfg)

    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    plain = build_model(cfg)
    assert not any(isinstance(m, WSConv2d) for m in plain.modules())
    plain.load_state_dict(model.state_dict())
    standardized = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, WSConv2d)}
    for name, p in plain.named_parameters():
        if name in standardized:
            p.data = standardize_weight(p.data)

    batch = make_batch()
    losses, expected = train_step(model, batch), train_step(plain, batch)
    assert len(losses) == 5
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)

    plain_parameters = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        expected = plain_parameters[name].grad
        if not p.requires_grad:
            assert p.grad is None and expected is None
            continue
        if name in standardized:
            weight = p.detach().clone().requires_grad_()
            (expected,) = torch.autograd.grad(standardize_weight(weight), weight, expected)
        error = (p.grad - expected).norm() / (expected.norm() + 1e-12)
        assert error < 1e-4, name


@pytest.mark.parametrize(
    "config_file",
    [
        pytest.param("COCO-Detection/retinanet_R_50_FPN_1x.yaml", marks=retinanet_with_gn),
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_detectron2s_other_models_train_when_converted(config_file):
    cfg = d2_model_zoo.get_config(config_file)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    for section in ("RESNETS", "FPN", "RETINANET", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        cfg.MODEL[section].NORM = "GN"
    model = build_model(cfg)
    names = list(model.state_dict())
    convert_ws_conv(model)
    assert list(model.state_dict()) == names

    batch = make_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = train_step(model, batch)
    assert all(loss.isfinite() for loss in losses.values())
    trained = [m for m in model.modules() if isinstance(m, WSConv2d) and m.weight.requires_grad]
    assert trained and all(m.weight.grad.isfinite().all() for m in trained)
    before = trained[0].weight.clone()
    optimizer.step()
    assert not torch.equal(trained[0].weight, before)
