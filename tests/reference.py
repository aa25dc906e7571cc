"""
MMDetection's GN+WS Faster and Mask R-CNN, and the losses of a Mask R-CNN, in plain PyTorch on
MMDetection's names: an expectation that owes nothing to Detectron2, nor to this project.
"""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, roi_align

MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


def conv_gn(x, state, conv, gn, stride=1, groups=1):
    weight = state[f"{conv}.weight"]
    flat = weight.flatten(1)
    mean, std = flat.mean(1)[:, None, None, None], flat.std(1)[:, None, None, None]
    weight = (weight - mean) / (std + 1e-5)
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    return F.group_norm(x, 32, state[f"{gn}.weight"], state[f"{gn}.bias"], 1e-5)


def conv(x, state, name):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def features(image, state):
    """(3, H, W) RGB of 0..255 -> [p2, ..., p6]"""
    x = ((image.float() - MEAN) / STD)[None]
    h, w = x.shape[-2:]
    x = F.pad(x, (0, -w % 32, 0, -h % 32))
    x = F.max_pool2d(conv_gn(x, state, "backbone.conv1", "backbone.gn1", 2).relu(), 3, 2, 1)
    outputs = []
    for layer in range(1, 5):
        block = 0
        while f"backbone.layer{layer}.{block}.conv1.weight" in state:
            name = f"backbone.layer{layer}.{block}"
            weight = state[f"{name}.conv2.weight"]
            stride = 2 if layer > 1 and block == 0 else 1
            y = conv_gn(x, state, f"{name}.conv1", f"{name}.gn1").relu()
            groups = weight.shape[0] // weight.shape[1]
            y = conv_gn(y, state, f"{name}.conv2", f"{name}.gn2", stride, groups).relu()
            y = conv_gn(y, state, f"{name}.conv3", f"{name}.gn3")
            if block == 0:
                x = conv_gn(x, state, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).relu()
            block += 1
        outputs.append(x)
    laterals = [
        conv_gn(x, state, f"neck.lateral_convs.{i}.conv", f"neck.lateral_convs.{i}.gn")
        for i, x in enumerate(outputs)
    ]
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], scale_factor=2)
    pyramid = [
        conv_gn(x, state, f"neck.fpn_convs.{i}.conv", f"neck.fpn_convs.{i}.gn")
        for i, x in enumerate(laterals)
    ]
    return pyramid + [pyramid[-1][:, :, ::2, ::2]]


def decode(boxes, deltas, image_size):
    """(N, 4) XYXY boxes and (N, K, 4) deltas -> (N, K, 4) boxes"""
    boxes = boxes[:, None]
    size = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., 2:] + boxes[..., :2]) / 2 + deltas[..., :2] * size
    size = size * deltas[..., 2:].clamp(max=math.log(1000 / 16)).exp()
    h, w = image_size
    limit = torch.tensor([w, h])
    corners = [(center + sign * size / 2).clamp(min=0).minimum(limit) for sign in (-1, 1)]
    return torch.cat(corners, dim=-1)


def rpn(pyramid, state):
    """Return the anchors, (N, 4), the scores, (N), and the deltas, (N, 1, 4), of each level."""
    for level, x in enumerate(pyramid):
        stride = 4 * 2**level
        x = conv(x, state, "rpn_head.rpn_conv").relu()
        score = conv(x, state, "rpn_head.rpn_cls")[0].permute(1, 2, 0).flatten()
        deltas = conv(x, state, "rpn_head.rpn_reg")[0].permute(1, 2, 0).reshape(-1, 1, 4)
        ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
        size = torch.stack([8 * stride / ratios, 8 * stride * ratios], dim=1)
        base = torch.cat([-size / 2, size / 2], dim=1)
        h, w = x.shape[-2:]
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        anchors = (torch.stack([x, y, x, y], dim=-1)[:, :, None] + base).reshape(-1, 4)
        yield anchors, score, deltas


def proposals(pyramid, state, image_size, num_proposals, num_before=1000):
    boxes, scores, levels = [], [], []
    for level, (anchors, score, deltas) in enumerate(rpn(pyramid, state)):
        score, order = score.sort(descending=True, stable=True)
        order = order[:num_before]
        boxes.append(decode(anchors[order], deltas[order], image_size)[:, 0])
        scores.append(score[:num_before].sigmoid())
        levels.append(torch.full((len(order),), level))
    boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
    valid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
    boxes, scores, levels = boxes[valid], scores[valid], levels[valid]
    return boxes[batched_nms(boxes, scores, levels, 0.7)[:num_proposals]]


def pool(pyramid, boxes, size):
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (scale / 56 + 1e-6).log2().floor().clamp(0, 3)
    out = torch.zeros(len(boxes), 256, size, size)
    for level in range(4):
        at = levels == level
        out[at] = roi_align(
            pyramid[level], [boxes[at]], size, 1 / (4 * 2**level), sampling_ratio=-1, aligned=True
        )
    return out


def head_convs(x, state, name):
    for i in range(4):
        x = conv_gn(x, state, f"{name}.{i}.conv", f"{name}.{i}.gn").relu()
    return x


def box_heads(pyramid, rois, state):
    x = head_convs(pool(pyramid, rois, 7), state, "roi_head.bbox_head.shared_convs")
    x = linear(x.flatten(1), state, "roi_head.bbox_head.shared_fcs.0").relu()
    deltas = linear(x, state, "roi_head.bbox_head.fc_reg").view(len(x), -1, 4)
    return linear(x, state, "roi_head.bbox_head.fc_cls"), deltas


def mask_head(pyramid, rois, state):
    x = head_convs(pool(pyramid, rois, 14), state, "roi_head.mask_head.convs")
    name = "roi_head.mask_head.upsample"
    x = F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2).relu()
    return conv(x, state, "roi_head.mask_head.conv_logits")


def detect(image, state, num_proposals=1000):
    """
    (3, H, W) RGB image of 0..255 -> {"features", "boxes" (N, 4), "scores", "classes", "masks"},
    boxes in the image's pixels, masks as (N, 28, 28) probabilities.
    """
    size = image.shape[-2:]
    pyramid = features(image, state)
    rois = proposals(pyramid, state, size, num_proposals)
    scores, deltas = box_heads(pyramid, rois, state)
    scores = scores.softmax(dim=1)[:, :-1]
    boxes = decode(rois, deltas * torch.tensor([0.1, 0.1, 0.2, 0.2]), size)
    roi, classes = (scores > 0.05).nonzero(as_tuple=True)
    boxes, scores = boxes[roi, classes], scores[roi, classes]
    keep = batched_nms(boxes, scores, classes, 0.5)[:100]
    boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
    out = {"features": pyramid, "boxes": boxes, "scores": scores, "classes": classes}
    if "roi_head.mask_head.conv_logits.weight" in state:
        masks = mask_head(pyramid, boxes, state).sigmoid()
        out["masks"] = masks[torch.arange(len(classes)), classes]
    return out


def encode(boxes, targets):
    """(N, 4) and (N, 4) XYXY boxes -> (N, 4) deltas"""
    size, own = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, 2:] + targets[:, :2] - boxes[:, 2:] - boxes[:, :2]) / 2
    return torch.cat([shift / size, (own / size).log()], dim=1)


def assign_anchors(iou, min_pos_iou):
    """
    MMDetection's MaxIoUAssigner with 0.7 and 0.3 for the (M, N) IoU of objects and anchors: the
    number of the object of each anchor, -1 for background, -2 for those that are left out. Without
    `min_pos_iou` Detectron2's rule, by which an anchor keeps the object that it overlaps most.
    """
    columns = iou.T.tolist()
    own = [column.index(max(column)) for column in columns]
    assigned = [
        i if max(column) >= 0.7 else -1 if max(column) < 0.3 else -2
        for i, column in zip(own, columns)
    ]
    for number, row in enumerate(iou.tolist()):
        for anchor, overlap in enumerate(row):
            if overlap == max(row) >= min_pos_iou:
                assigned[anchor] = number if min_pos_iou else own[anchor]
    return torch.tensor(assigned)


def losses(image, state, boxes, classes, masks, min_pos_iou, num_proposals):
    """
    The losses of all anchors and all proposals of an image, none left out by sampling.

    (3, H, W) RGB image of 0..255, (M, 4) boxes, (M) classes, (M, H, W) masks.
    """
    size = image.shape[-2:]
    pyramid = features(image, state)
    anchors, scores, deltas = (torch.cat(parts) for parts in zip(*rpn(pyramid, state)))
    assigned = assign_anchors(box_iou(boxes, anchors), min_pos_iou)
    positive, used = assigned >= 0, assigned >= -1
    targets = encode(anchors[positive], boxes[assigned[positive]])
    out = {
        "loss_rpn_cls": F.binary_cross_entropy_with_logits(scores[used], positive[used].float()),
        "loss_rpn_loc": (deltas[positive, 0] - targets).abs().sum() / used.sum(),
    }
    rois = torch.cat([proposals(pyramid, state, size, num_proposals, 2000), boxes])
    best, assigned = box_iou(boxes, rois).max(dim=0)
    positive = best >= 0.5
    own = assigned[positive]
    labels = torch.full((len(rois),), 80)
    labels[positive] = classes[own]
    scores, deltas = box_heads(pyramid, rois, state)
    targets = encode(rois[positive], boxes[own]) / torch.tensor([0.1, 0.1, 0.2, 0.2])
    deltas = deltas[positive, labels[positive]]
    out["loss_cls"] = F.cross_entropy(scores, labels)
    out["loss_box_reg"] = (deltas - targets).abs().sum() / len(rois)
    logits = mask_head(pyramid, rois[positive], state)[torch.arange(len(own)), labels[positive]]
    boxes = torch.cat([torch.arange(len(own))[:, None], rois[positive]], dim=1)
    crops = roi_align(masks[own, None].float(), boxes, 28, sampling_ratio=-1, aligned=True)
    out["loss_mask"] = F.binary_cross_entropy_with_logits(logits, (crops[:, 0] >= 0.5).float())
    return out
