"""The peers that this package is measured beside: that each is what its name says, or a comparison is worth nothing."""

import json

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from sd_resnet.analysis.networks import network_of
from sd_resnet.bench import breaks, measure, peers
from sd_resnet.bench.peers import COMPOSER, DINOV2, PEERS, TIMM, TORCHVISION, peer_networks
from sd_resnet.cli import main as cli

from ..conftest import one_line

VIT = 'sd_vit_tiny_patch16_224'
SMALL = {
    VIT: dict(img_size=32, embed_dim=32, depth=4, num_heads=2, init_values=0.5),
    'sd_seresnet50': dict(channels=(8, 8, 16, 16), layers=(1, 2, 1, 1), zero_init_last=False),
    'sd_convnext_atto': dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), ls_init_value=0.5),
    'sd_convnext_tiny': dict(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), ls_init_value=0.5),
}


def create(name, **kwargs):
    torch.manual_seed(0)
    (own,) = (own for model, own in SMALL.items() if model.endswith(name.removeprefix('sd_')))
    return timm.create_model(name, num_classes=10, **own, **kwargs).train()


def blocks_of(network, kind=peers.Dropping):
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize('model', SMALL)
def test_undropped_every_peer_is_timms_network_bit_for_bit(model):
    """What was written anew here would else be another network, and its step another step."""
    x, plain = torch.randn(4, 3, 32, 32), create(model.removeprefix('sd_'))
    networks = peer_networks(model, 0.0, create)
    assert list(networks) == list(PEERS)
    for network in networks.values():
        assert network.state_dict().keys() == plain.state_dict().keys()
    expected = [plain(x), plain.eval()(x)]
    for network in networks.values():
        torch.testing.assert_close([network(x), network.eval()(x)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('schedule', [None, 'uniform'])
@pytest.mark.parametrize('model', [VIT, 'sd_seresnet50'])
def test_every_peer_drops_with_the_probabilities_of_this_package(model, schedule):
    """At other rates it would do other work, and no share of time could be compared."""
    ours = network_of(create(model, drop_path_rate=0.4, drop_path_schedule=schedule))
    due = [1 - drop_path.p_l for own in ours.drop_paths.values() for drop_path in own]
    networks = peer_networks(model, 0.4, create, schedule)
    found = {
        TIMM: [module.drop_prob for module in blocks_of(networks[TIMM], DropPath)],
        TORCHVISION: [module.p for module in blocks_of(networks[TORCHVISION], StochasticDepth)],
    }
    for rates in found.values():
        assert rates == pytest.approx([rate for rate in due if rate], abs=1e-6)
    each = len(due) // len(ours.drop_paths)  # drop paths of a block
    for peer in (DINOV2, COMPOSER):
        assert [block.rate for block in blocks_of(networks[peer])] == pytest.approx(due[::each], abs=1e-6)


def test_networks_of_other_blocks_have_no_dinov2_and_no_composer():
    def create(name, **kwargs):
        return timm.create_model(name, **kwargs)

    assert list(peer_networks('sd_test_byobnet', 0.1, create)) == [TIMM, TORCHVISION]
    assert peer_networks('sd_resnet20_cifar', 0.1, create) == {}


def one_block(model, peer, rate, name):
    return peer_networks(model, rate, create, 'uniform')[peer].get_submodule(name)


@pytest.mark.parametrize(
    ('model', 'name', 'shape'),
    [
        (VIT, 'blocks.1', (5, 32)),
        ('sd_seresnet50', 'layer2.0', (32, 4, 4)),
        ('sd_convnext_tiny', 'stages.0.blocks.0', (8, 4, 4)),
    ],
)
def test_dinov2_runs_each_branch_on_a_random_subset_of_floor_p_n_rows(model, name, shape, monkeypatch):
    block, x = one_block(model, DINOV2, 0.4, name), torch.rand(6, *shape)
    ran = []
    next(block.children()).register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    assert block(x).shape[0] == 6
    assert ran == [3]
    if model == VIT:
        nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)
        monkeypatch.setattr(torch, 'randperm', lambda n, device: torch.tensor([4, 0, 5, 1, 2, 3]))
        out, whole = block(x), block.eval()(x)
        torch.testing.assert_close(out[[0, 4, 5]], (x + 2 * (whole - x))[[0, 4, 5]])
        assert torch.equal(out[[1, 2, 3]], x[[1, 2, 3]])


@pytest.mark.parametrize(('batch', 'rate', 'rows'), [(1, 0.4, 1), (4, 0.4, 2), (16, 0.4, 9), (4, 0.2, 3), (4, 0.1, 4)])
def test_dinov2_runs_on_whole_rows_at_least_one_and_on_all_up_to_rate_01(batch, rate, rows):
    block = one_block(VIT, DINOV2, rate, 'blocks.0')
    ran = []
    block.norm1.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    block(torch.randn(batch, 5, 32))
    assert ran == [rows]
    assert block.expected_share(batch) == rows / batch


@pytest.mark.parametrize(('name', 'projects'), [('layer2.0', True), ('layer2.1', False)])
def test_composer_drops_whole_blocks_and_weights_branches_in_evaluation(name, projects, monkeypatch):
    block = one_block('sd_seresnet50', COMPOSER, 0.4, name)
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    monkeypatch.setattr(torch, 'bernoulli', lambda p: torch.zeros(()))
    dropped = block(x)
    assert torch.equal(dropped, block.downsample(x).relu() if projects else x)
    monkeypatch.setattr(torch, 'bernoulli', lambda p: torch.ones(()))
    plain = create('seresnet50').get_submodule(name)
    assert torch.equal(block(x), plain(x))

    block.act3, plain.act3 = nn.Identity(), nn.Identity()
    shortcut = block.eval().downsample(x) if projects else x
    block.load_state_dict(plain.eval().state_dict())
    shortcut = plain.downsample(x) if projects else x
    torch.testing.assert_close(block.eval()(x) - shortcut, 0.6 * (plain(x) - shortcut))


@pytest.mark.parametrize('peer', [DINOV2, COMPOSER])
def test_what_peers_ran_is_told_after_each_forward_pass(peer):
    """Or the luck of Composer's draws would pass for its speed."""
    network, told = peer_networks(VIT, 0.4, create, 'uniform')[peer], []
    peers.on_forward(network, told.append)
    for _ in range(50):
        network(torch.randn(4, 3, 32, 32))
    means = torch.tensor(told).mean(0)
    assert len(means) == 4
    assert {share for shares in told for share in shares} == ({0.5} if peer == DINOV2 else {0.0, 1.0})
    assert means.tolist() == pytest.approx(peers.expected_shares(network, 4), abs=0.25)


def test_each_peer_races_beside_its_own_undropped_network():
    settings = measure.Settings((VIT,), (0.4,), (5,), (32,), schedule='uniform', steps=2, saved_steps=3, peers=True)
    (race,) = measure.run(settings, progress=False)
    undropped = [peer + measure.UNDROPPED for peer in (DINOV2, COMPOSER)]
    assert list(race.contestants) == [measure.CONSTANT_DEPTH, *PEERS, *undropped, 'batch', 'subset']
    for peer in (DINOV2, COMPOSER):
        assert race.undropped(peer) is race.contestants[peer + measure.UNDROPPED]
    for name in (TIMM, TORCHVISION, 'batch', 'subset', *undropped):
        assert race.undropped(name) is race.contestants[measure.CONSTANT_DEPTH]
    bounds = {name: race.contestants[name].bound for name in (*PEERS, *undropped, 'batch', 'subset')}
    assert bounds[COMPOSER] == pytest.approx(bounds['batch'])
    assert bounds[DINOV2] == pytest.approx(bounds['subset'], abs=0.01)  # 3 of 5 rows
    assert {bounds[name] for name in (TIMM, TORCHVISION, *undropped)} == {1.0}
    assert race.contestants[DINOV2].observed == [bounds[DINOV2]]
    assert [len(race.contestants[name].saved_bytes) for name in (DINOV2, COMPOSER)] == [1, 3]


def test_odds_that_are_not_p_are_told_from_chance():
    networks = breaks.networks_of(VIT)
    assert breaks.odds(VIT, networks[TIMM], 4)[1]
    assert breaks.odds(VIT, networks['subset'], 4)[1]
    assert breaks.odds(VIT, networks[DINOV2], 16) == (9 / 16, False)  # where 9.6 rows are due


def test_a_window_that_starts_at_the_first_row_every_time_has_not_the_odds_of_each_row(monkeypatch):
    network = breaks.networks_of(VIT)[DINOV2]
    monkeypatch.setattr(torch, 'randperm', lambda n, device: torch.arange(n))
    monkeypatch.setattr(breaks, 'RATE', 0.5)
    assert breaks.odds(VIT, network, 4) == (0.5, False)


class OwnDice(nn.Module):
    """Draws from a generator that checkpointing does not restore."""

    def __init__(self, generator):
        super().__init__()
        self.weight, self.generator, self.checkpointing = nn.Parameter(torch.ones(())), generator, False

    def set_grad_checkpointing(self, enable):
        self.checkpointing = enable

    def drawn(self, x):
        noise = torch.rand((), generator=self.generator[0])
        return (x * self.weight * noise).sin()

    def forward(self, x):
        if self.checkpointing:
            return torch.utils.checkpoint.checkpoint(self.drawn, x, use_reentrant=False)
        return self.drawn(x)


class Shared(list):
    def __deepcopy__(self, memo):
        return self


def test_checkpointing_that_draws_anew_is_seen():
    assert breaks.train_checkpointed(OwnDice(Shared([None]))) == {breaks.CHECKPOINTING: 'same'}
    assert breaks.train_checkpointed(OwnDice(Shared([torch.Generator()]))) == {breaks.CHECKPOINTING: 'differs'}


def test_torchs_limit_of_recompilations_is_seen():
    weight = nn.Parameter(torch.ones(()))
    numbers = iter(range(99))

    def scaled(x, name):
        return x * weight * len(name) + int(name)

    changing = breaks.train_compiled(lambda x: scaled(x, str(next(numbers))), fullgraph=False)
    assert changing[breaks.LIMIT] == 'hit'
    steady = breaks.train_compiled(lambda x: scaled(x, '1'), fullgraph=True)
    assert steady == {breaks.FULLGRAPH: 'works', breaks.GRAPHS: '1', breaks.LIMIT: 'not hit'}


def test_the_error_that_came_first_is_the_one_that_is_told():
    with pytest.raises(RuntimeError, match='cause'):
        breaks._both_ranks([(2.0, 'connection closed', ''), (1.0, 'cause', '')])
    assert breaks._both_ranks([(2.0, None, 'a'), (1.0, None, 'b')])[breaks.RANKS] == 'differ'


def test_growth_goes_without_peers(capsys):
    """Most of its networks are the paper's, which they do not have."""
    assert cli.main(['bench', '--growth', '--peers']) == 2
    assert '--peers does not go with --growth' in one_line(capsys)


def test_the_command_prints_and_records_what_was_raced_and_what_breaks(tmp_path, capsys, monkeypatch):
    """All trials, on two ranks too; Composer's blocks leave parameters without gradients, this package's do not."""
    monkeypatch.setattr(breaks, 'NETWORKS', {VIT: breaks.NETWORKS[VIT]})
    for name, value in dict(SIZES=(4,), DRAWS=100, COMPILED_STEPS=12).items():
        monkeypatch.setattr(breaks, name, value)
    flags = ['--model', 'sd_test_vit', '--size', '32', '--batch', '3', '--steps', '2', '--saved-steps', '1']
    assert cli.main(['bench', '--peers', *flags, '--json', str(tmp_path / 'r.json')]) == 0
    said, record = capsys.readouterr().out, json.loads((tmp_path / 'r.json').read_text())
    assert set(PEERS) < set(record['races'][0]['contestants'])
    words = {name: each['words'] for name, each in record['breaks'][VIT].items()}
    assert list(words) == [*PEERS, 'batch', 'subset']
    assert {name: word[breaks.DDP] for name, word in words.items()} == dict.fromkeys(words, 'works') | {
        COMPOSER: 'fails'
    }
    assert all(word[breaks.RANKS] == 'equal' for name, word in words.items() if name != COMPOSER)
    assert 'finished reduction' in record['breaks'][VIT][COMPOSER]['errors'][breaks.DDP]
    assert words[COMPOSER][breaks.FULLGRAPH] == 'fails'
    assert words['subset'][breaks.FULLGRAPH] == 'works'
    assert all(word in said for word in ('finished reduction', 'DINOv2, undropped', 'odds, 4'))
