"""A network of ours beside timm's with the same weights: what a client does to one, it does to the other.

Nothing here names a rescaling: the default is what a client gets, and under it weights and evaluation are timm's.
"""

import timm
import torch
import torch.nn.functional as F

import sd_resnet

NETS = {
    'resnet18': dict(channels=(8, 8, 16, 16), zero_init_last=False),
    'vit_tiny_patch16_224': dict(img_size=32, embed_dim=48, depth=3, num_heads=2),
    'convnext_atto': dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), ls_init_value=0.5),
}
NAMES = list(NETS)
CONVERTED_RESNET = 'converted resnet18'  # timm's own, converted in place: with BatchNorm, as the other two have none
MODES = ('batch', 'subset')
DROPPING = [(name, mode) for name in NETS for mode in MODES]
RATE = 0.6  # so high that a few steps without any drop are out of the question
CLASSES = 5


def timm_net(name, **kwargs):
    """timm's own network, with norms of no special value."""
    torch.manual_seed(0)
    name = name.removeprefix('converted ')
    model = timm.create_model(name, **{'num_classes': CLASSES, **NETS[name], **kwargs})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
                module.weight.uniform_(0.6, 1.4)
                module.bias.normal_(0, 0.1)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return model


def sd_net(name, rate=0.0, weights=None, **kwargs):
    """Ours, as a client's user creates it; the ViT drops at one rate, since three blocks leave timm's rule little."""
    torch.manual_seed(0)
    if name == CONVERTED_RESNET:
        model = timm_net(name)
        sd_resnet.convert(model, rate, 'uniform', kwargs.get('drop_path_mode', 'subset'), input_size=(3, 32, 32))
        if weights is not None:
            model.load_state_dict(weights)
        return model
    schedule = {} if 'resnet' in name or not rate else {'drop_path_schedule': 'uniform'}
    options = {'num_classes': CLASSES, **NETS[name], **schedule, **kwargs}
    model = timm.create_model(f'sd_{name}', drop_path_rate=rate, **options)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def pair(name, rate=0.0, timm_kwargs=None, **kwargs):
    """timm's network, and ours with its weights."""
    theirs = timm_net(name, **(timm_kwargs or {}))
    return theirs, sd_net(name, rate, theirs.state_dict(), **kwargs)


def images(batch=6, size=32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def labels(batch=6, seed=0):
    return torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def evaluate(model, x=None):
    """What a network gives in evaluation; its modules' flags stay."""
    flags = {module: module.training for module in model.modules()}
    out = model.eval()(images(2) if x is None else x)
    for module, flag in flags.items():
        module.training = flag
    return out


def train(model, steps=3, optimizer=None, forward=None, backward=None, seed=1, lr=0.05):
    """A few steps of SGD from one seed, and their losses.

    Args:
        model: In training mode afterwards.
        steps: Number of steps, each with images of its own.
        optimizer: Momentum SGD if not given.
        forward: From images to logits, the model itself if not given.
        backward: What is called with the loss.
        seed: Of what the network draws.
        lr: Of the optimizer.
    """
    model.train()
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy((forward or model)(images(seed=step)), labels(seed=step))
        (backward or torch.Tensor.backward)(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_weights(model, other):
    """Names, values and types, bit for bit."""
    ours, theirs = (dict(m) if isinstance(m, dict) else m.state_dict() for m in (model, other))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


def assert_dropped(losses, plain_losses, model):
    """It trained, and did drop: a client that puts something in a block's place could end it without a word."""
    assert all(loss < 100 for loss in losses), losses  # no NaN, no infinity
    assert losses != plain_losses
    assert all(p.isfinite().all() for p in model.parameters())
