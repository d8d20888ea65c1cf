"""Loading a checkpoint never changes what the network computes at test time, whatever convention it comes from."""

import argparse
import copy
import errno
import itertools
import os
import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.layers import convert_splitbn_model
from timm.utils import CheckpointSaver, ModelEmaV3

from sd_resnet import to_resnet
from sd_resnet.resnets import checkpoints
from sd_resnet.resnets.checkpoints import export, read_checkpoint

from ..conftest import IMAGENET, NARROW, images, make

CONVENTIONS = {
    'plain': dict(drop_path_rate=0),
    'linear test': dict(drop_path_rate=0.5, drop_path_rescale='test'),
    'uniform test': dict(drop_path_rate=0.2, drop_path_schedule='uniform', drop_path_rescale='test'),
    'train': dict(drop_path_rate=0.5),
}
LETTER = dict(drop_path_rescale='test')
PAIRS = list(itertools.product(CONVENTIONS, CONVENTIONS))
# of the largest logit, computed in float64: what rounding the weights of 8 to 16 blocks to the type amounts to
PRECISION = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def _logits(model):
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x)


def _agree(model, reference):
    out, expected = _logits(model), _logits(reference)
    return bool((out - expected).abs().max() <= PRECISION[model.fc.weight.dtype] * expected.abs().max())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('source', 'target'), PAIRS, ids=lambda name: name)
def test_every_convention_loads_into_every_other(source, target, dtype):
    trained = make('sd_resnet18', **CONVENTIONS[source]).to(dtype)
    model = make('sd_resnet18', **CONVENTIONS[target]).to(dtype)
    model.load_state_dict(trained.state_dict())
    assert _agree(model, trained)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_models_of_low_precision_compute_in_their_own_type(dtype):
    trained = make('sd_resnet20_cifar', **LETTER)
    model = make('sd_resnet20_cifar', drop_path_rate=0.2, dtype=dtype, **LETTER)
    model.load_state_dict(trained.state_dict())
    x = images()
    out, expected = model(x.to(dtype)), trained(x)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= 2 * PRECISION[dtype] * expected.abs().max()


@pytest.mark.parametrize('name', ['sd_resnet50', 'sd_resnet20_cifar'])
@pytest.mark.parametrize(('source', 'target'), PAIRS, ids=lambda name: name)
def test_other_blocks_load_as_well(name, source, target):
    trained, model = make(name, **CONVENTIONS[source]), make(name, **CONVENTIONS[target])
    model.load_state_dict(trained.state_dict())
    assert _agree(model, trained)


@pytest.mark.parametrize('library', ['timm', 'torchvision'])
@pytest.mark.parametrize('target', CONVENTIONS)
def test_plain_resnets_of_timm_and_torchvision_load(library, target):
    if library == 'timm':
        plain = make('resnet18', full=True)
    else:
        plain = torchvision.models.resnet18(num_classes=10)
        plain.load_state_dict(make('resnet18', full=True).state_dict())
    model = make('sd_resnet18', full=True, **CONVENTIONS[target])
    model.load_state_dict(plain.state_dict())
    assert _agree(model, plain)


@pytest.mark.parametrize('name', IMAGENET)
def test_by_default_state_dict_and_evaluation_are_timms_bit_for_bit(name):
    """Whatever merges, filters, averages or copies state dicts works with them as with timm's."""
    small = {} if '152' in name or '101' in name else {'full': True}
    ours, plain = make(f'sd_{name}', **small), make(name, **small)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in plain.state_dict().items())
    with torch.no_grad():
        x = images(2, 64)
        assert torch.equal(ours(x), plain(x))
        assert all(map(torch.equal, ours.forward_intermediates(x)[1], plain.forward_intermediates(x)[1]))


def test_a_plain_resnet_refuses_an_unfolded_checkpoint():
    with pytest.raises(RuntimeError, match=r'Unexpected key.*layer1.0.drop_path.survival_prob'):
        make('resnet18').load_state_dict(make('sd_resnet18', **LETTER).state_dict())


def test_the_probability_is_in_the_state_dict_where_it_is_below_one_and_in_test_rescaling():
    keys = {k: v for k, v in make('sd_resnet18', **LETTER).state_dict().items() if 'drop_path' in k}
    assert list(keys) == [f'layer{s}.{b}.drop_path.survival_prob' for s in range(1, 5) for b in range(2)]
    assert [float(v) for v in keys.values()] == [1 - l / 16 for l in range(1, 9)]
    for convention in ('plain', 'train'):
        assert not [k for k in make('sd_resnet18', **CONVENTIONS[convention]).state_dict() if 'drop_path' in k]
    state = make('sd_resnet18', drop_path_schedule='timm', **LETTER).state_dict()
    assert 'layer1.0.drop_path.survival_prob' not in state


class TestCorners:
    def test_a_model_that_was_made_in_inference_mode_is_saved(self):
        with torch.inference_mode():
            model = timm.create_model('sd_resnet20_cifar', **LETTER)
        model.set_drop_path(rate=0.5)
        assert model.state_dict()['layer3.2.drop_path.survival_prob'] == 0.5

    def test_loading_does_not_touch_the_callers_dict(self):
        state = make('resnet18').state_dict()
        before = copy.deepcopy(state)
        make('sd_resnet18').load_state_dict(state)
        assert list(state) == list(before)
        assert all(torch.equal(state[k], before[k]) for k in before)

    @pytest.mark.parametrize('source', CONVENTIONS)
    def test_a_model_on_the_meta_device_with_assign(self, source):
        trained = make('sd_resnet18', **CONVENTIONS[source])
        with torch.device('meta'):
            model = make('sd_resnet18', **LETTER)
        model.load_state_dict(trained.state_dict(), assign=True)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert _agree(model.to('cpu'), trained)
        again = make('sd_resnet18', drop_path_rate=0.1)
        again.load_state_dict(model.state_dict())
        assert _agree(again, trained)

    def test_assign_keeps_the_files_type(self):
        trained = make('sd_resnet18', drop_path_rate=0.3, **LETTER).half()
        model = make('sd_resnet18', **LETTER)
        model.load_state_dict(trained.state_dict(), assign=True)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert _agree(model, trained)

    def test_to_empty_then_load(self):
        trained = make('sd_resnet18', drop_path_rate=0.3, **LETTER)
        with torch.device('meta'):
            model = make('sd_resnet18', **LETTER)
        model.to_empty(device='cpu')
        model.load_state_dict(trained.state_dict())
        assert _agree(model, trained)
        other = make('sd_resnet18', drop_path_rate=0)
        other.load_state_dict(model.state_dict())  # the travelling numbers are right again too
        assert _agree(other, trained)

    def test_parameters_alone_are_refused_under_test_rescaling_as_they_do_not_say_whose_they_are(self):
        model, other = make('sd_resnet18', **LETTER), make('sd_resnet18', **LETTER)
        parameters = dict(other.named_parameters())
        with pytest.raises(RuntimeError, match='a state dict of parameters alone does not say whether it was scaled'):
            model.load_state_dict(parameters, strict=False)
        stored = {k: v for k, v in other.state_dict().items() if k.endswith('survival_prob')}
        model.load_state_dict({**parameters, **stored}, strict=False)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
        default = make('sd_resnet18')
        default.load_state_dict(parameters, strict=False)
        assert all(torch.equal(a, b) for a, b in zip(default.parameters(), other.parameters()))

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_a_lower_precision_file_of_the_same_model_is_loaded_unscaled(self, dtype):
        trained = make(
            'sd_resnet20_cifar', drop_path_rate=0.3, **LETTER
        )  # p_l = 1 - l/9 0.3 is not exact in these types
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
        model = make('sd_resnet20_cifar', drop_path_rate=0.3, **LETTER)
        model.load_state_dict(state)
        for key, value in model.state_dict().items():
            if 'drop_path' not in key:
                assert torch.equal(value, state[key].to(value.dtype)), key

    def test_rounds_of_saving_and_loading_do_not_drift(self):
        model = make('sd_resnet20_cifar', drop_path_rate=0.3, **LETTER).bfloat16()
        first = copy.deepcopy(model.state_dict())
        for _ in range(20):
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())

    def test_auxiliary_batchnorms_are_rescaled_too(self):
        trained = convert_splitbn_model(make('sd_resnet18', drop_path_rate=0.5, **LETTER), 2)
        model = convert_splitbn_model(make('sd_resnet18', drop_path_rate=0), 2)
        model.load_state_dict(trained.state_dict())
        norm, expected = model.layer4[1].bn2, trained.layer4[1].bn2
        torch.testing.assert_close(norm.weight, expected.weight * 0.5)
        torch.testing.assert_close(norm.aux_bn[0].weight, expected.aux_bn[0].weight * 0.5)
        torch.testing.assert_close(norm.aux_bn[0].bias, expected.aux_bn[0].bias * 0.5)

    def test_group_norm_has_no_statistics_and_is_rescaled(self):
        trained = make('sd_resnet18', full=True, norm_layer='groupnorm', **LETTER)
        model = make('sd_resnet18', full=True, norm_layer='groupnorm', drop_path_rate=0)
        model.load_state_dict(trained.state_dict())
        assert _agree(model, trained)

    @pytest.mark.parametrize('value', [0.0, -1.0, 1.5, float('nan')])
    def test_an_impossible_probability_is_refused(self, value):
        state = make('sd_resnet18', **LETTER).state_dict()
        state['layer1.0.drop_path.survival_prob'] = torch.tensor(value)
        with pytest.raises(RuntimeError, match=r'layer1.0.drop_path.survival_prob must be a survival probability in'):
            make('sd_resnet18').load_state_dict(state)

    def test_a_block_loads_on_its_own(self):
        trained, model = (make('sd_resnet18', drop_path_rate=rate, **LETTER) for rate in (0.3, 0.8))
        model.layer4[1].load_state_dict(trained.layer4[1].state_dict())
        torch.testing.assert_close(model.layer4[1].bn2.weight * 0.2, trained.layer4[1].bn2.weight * 0.7)

    def test_another_number_of_classes_loads_without_strictness(self):
        trained, model = make('sd_resnet18', drop_path_rate=0.3, **LETTER), make('sd_resnet18', num_classes=3)
        state = {k: v for k, v in trained.state_dict().items() if not k.startswith('fc')}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            x = images(dtype=torch.float64)
            a, b = (m.double().eval().forward_features(x) for m in (model, trained))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_an_average_of_weights_keeps_pace_with_the_model(self):
        model = make('sd_resnet20_cifar', drop_path_rate=0.3, **LETTER)
        ema = ModelEmaV3(model, decay=0.9)
        for _ in range(50):
            ema.update(model)
        assert _agree(ema.module, model)
        assert all(torch.equal(v, ema.module.state_dict()[k]) for k, v in model.state_dict().items() if 'drop' in k)

    def test_a_scripted_models_checkpoint_loads(self):
        for rescale in ('train', 'test'):
            trained = make('sd_resnet18', drop_path_rate=0.3, drop_path_rescale=rescale)
            blocks = [type(block) for block in trained.blocks()]
            state = torch.jit.script(trained).state_dict()
            assert list(state) == list(trained.state_dict())
            model = make('sd_resnet18', drop_path_rate=0.6, drop_path_rescale='test')
            model.load_state_dict(state)
            assert _agree(model, trained)
            assert [type(block) for block in trained.blocks()] == blocks  # scripting left the model as it was


class TestToResnet:
    @pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet50d', 'resnext50_32x4d'])
    @pytest.mark.parametrize('convention', CONVENTIONS)
    def test_it_is_a_plain_timm_resnet_that_computes_the_same(self, name, convention):
        model = make(f'sd_{name}', **CONVENTIONS[convention])
        probs = model.survival_probs
        plain, timms = to_resnet(model), make(name)
        assert type(plain) is type(timms)
        assert [type(m) for m in plain.modules()] == [type(m) for m in timms.modules()]
        assert list(plain.state_dict()) == list(timms.state_dict())
        assert vars(plain).keys() == vars(timms).keys()
        assert _agree(plain, model)
        timms.load_state_dict(plain.state_dict())
        assert _agree(timms, model)
        plain.train()(images()).sum().backward()
        assert model.survival_probs == probs

    def test_a_cifar_net_is_the_same_class_at_rate_zero_and_says_so(self):
        model = make('sd_resnet20_cifar')
        with pytest.warns(UserWarning, match='timm has no architecture for the CIFAR nets'):
            plain = to_resnet(model)
        assert type(plain) is type(model)
        assert set(plain.survival_probs) == {1.0}
        assert _agree(plain, model)

    def test_other_models_are_refused(self):
        with pytest.raises(TypeError, match='model must be a model of sd_resnet, got ResNet'):
            to_resnet(timm.create_model('resnet18'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """What timm's train.py leaves behind: its own saver, an argparse.Namespace, EMA, optimizer state."""
    folder = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    model = make('sd_resnet18', full=True, num_classes=7, in_chans=1, **LETTER)
    averaged = ModelEmaV3(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    args = argparse.Namespace(model='sd_resnet18', drop_path=None, model_kwargs={'drop_path_mode': 'row', **LETTER})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, args, model_ema=averaged, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=50.0)
    return folder, model, averaged.module


class TestExport:
    @pytest.mark.parametrize('use_ema', [True, False])
    def test_timms_checkpoint_becomes_a_plain_resnets_file(self, trained, tmp_path, use_ema):
        folder, model, averaged = trained
        name, model_args = export(folder / 'model_best.pth.tar', tmp_path / 'out.safetensors', use_ema=use_ema)
        assert (name, model_args) == ('resnet18', {'num_classes': 7, 'in_chans': 1})
        plain = timm.create_model(name, **model_args)
        plain.load_state_dict(load_file(tmp_path / 'out.safetensors'))
        reference, x = (averaged if use_ema else model), torch.randn(2, 1, 48, 48)
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(x), copy.deepcopy(reference).eval()(x), rtol=1e-4, atol=1e-4)
        assert os.listdir(tmp_path) == ['out.safetensors']

    @pytest.mark.parametrize('name', ['sd_resnet34', 'sd_resnet50t', 'sd_resnext50_32x4d', 'sd_resnet20_cifar'])
    def test_the_architecture_of_a_bare_safetensors_file_is_found(self, name, tmp_path):
        model = make(name, full=True, **LETTER)
        save_file(model.state_dict(), tmp_path / 'in.safetensors')
        found, model_args = export(tmp_path / 'in.safetensors', tmp_path / 'out.safetensors')
        assert found == (name if 'cifar' in name else name.removeprefix('sd_'))
        assert model_args == ({'drop_path_rate': 0} if 'cifar' in name else {'num_classes': 10})
        plain = timm.create_model(found, **model_args)
        plain.load_state_dict(load_file(tmp_path / 'out.safetensors'))
        assert _agree(plain, model)

    def test_the_pooling_of_the_run_is_the_files(self, tmp_path):
        """timm's --gp is no --model-kwargs, and a network with average pooling takes the weights as well."""
        model = make('sd_resnet18', global_pool='max')
        args = argparse.Namespace(model='sd_resnet18', gp='max', model_kwargs=NARROW)
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'in.pth')
        name, model_args = export(tmp_path / 'in.pth', tmp_path / 'out.safetensors')
        plain = timm.create_model(name, **model_args)
        plain.load_state_dict(load_file(tmp_path / 'out.safetensors'))
        assert _agree(plain, model)

    def test_a_network_that_came_from_the_hub_is_known_by_its_tensors(self, tmp_path):
        model = make('sd_seresnet18', full=True)
        args = argparse.Namespace(model='hf-hub:me/sd_seresnet18.mine', gp=None, model_kwargs={})
        torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'in.pth')
        assert export(tmp_path / 'in.pth', tmp_path / 'out.safetensors') == ('seresnet18', {'num_classes': 10})

    def test_an_architecture_is_not_guessed_where_others_have_the_same_tensors(self, tmp_path):
        """`resnetblur18` has those of `resnet18`, and would give other outputs."""
        save_file(make('sd_resnetblur18', full=True).state_dict(), tmp_path / 'in.safetensors')
        with pytest.raises(ValueError, match=r'architecture \(--model\) must be given: .* sd_resnet18, sd_resnetb'):
            export(tmp_path / 'in.safetensors', tmp_path / 'out.safetensors')
        assert not (tmp_path / 'out.safetensors').exists()
        done = export(tmp_path / 'in.safetensors', tmp_path / 'out.safetensors', architecture='resnetblur18')
        assert done == ('resnetblur18', {'num_classes': 10})

    def test_prefixes_and_training_only_norms_are_dropped(self, tmp_path):
        model = make('sd_resnet34', full=True)
        state = convert_splitbn_model(copy.deepcopy(model), 2).state_dict()
        torch.save({'state_dict': {f'module.{k}': v for k, v in state.items()}}, tmp_path / 'ddp.pth')
        export(tmp_path / 'ddp.pth', tmp_path / 'out.safetensors')
        plain = timm.create_model('resnet34', num_classes=10)
        plain.load_state_dict(load_file(tmp_path / 'out.safetensors'))
        assert _agree(plain, model)

    def test_a_checkpoint_of_another_architecture_is_refused(self, tmp_path):
        torch.save(timm.create_model('res2net50_14w_8s').state_dict(), tmp_path / 'other.pth')
        with pytest.raises(ValueError, match="fits none of this package's architectures"):
            export(tmp_path / 'other.pth', tmp_path / 'out.safetensors')
        with pytest.raises(ValueError, match=r'is not a checkpoint of sd_resnet50: .*Missing key'):
            export(tmp_path / 'other.pth', tmp_path / 'out.safetensors', architecture='resnet50')
        with pytest.raises(ValueError, match=r"architecture must be .*, for example sd_\w+, .*, got 'vit'"):
            export(tmp_path / 'other.pth', tmp_path / 'out.safetensors', architecture='vit')
        save_file({'a': torch.ones(1)}, tmp_path / 'tiny.safetensors')
        with pytest.raises(ValueError, match='fits none'):
            export(tmp_path / 'tiny.safetensors', tmp_path / 'out.safetensors')
        assert not (tmp_path / 'out.safetensors').exists()

    def test_an_existing_file_is_not_overwritten(self, trained, tmp_path):
        (tmp_path / 'out.safetensors').write_text('mine')
        with pytest.raises(FileExistsError, match='exists; remove it, or choose another name'):
            export(trained[0] / 'last.pth.tar', tmp_path / 'out.safetensors')
        assert (tmp_path / 'out.safetensors').read_text() == 'mine'

    def test_a_full_disk_leaves_nothing_half_written(self, trained, tmp_path, monkeypatch):
        def full(tensors, path, **kwargs):
            path.write_bytes(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))

        monkeypatch.setattr(checkpoints, 'save_file', full)
        with pytest.raises(OSError, match='No space left on device'):
            export(trained[0] / 'last.pth.tar', tmp_path / 'out.safetensors')
        assert os.listdir(tmp_path) == []

    def test_a_missing_folder_is_named(self, trained, tmp_path):
        with pytest.raises(OSError, match='nowhere'):
            export(trained[0] / 'last.pth.tar', tmp_path / 'nowhere' / 'out.safetensors')


class TestReadCheckpoint:
    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'none.pth is not a file'):
            read_checkpoint(tmp_path / 'none.pth')
        with pytest.raises(FileNotFoundError, match='is not a file'):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize('name', ['cut.pth', 'cut.safetensors'])
    @pytest.mark.parametrize('keep', [0, 5, 0.5])
    def test_a_file_cut_short_is_refused_by_name(self, tmp_path, name, keep):
        path = tmp_path / name
        state = {'a': torch.randn(1000)}
        torch.save(state, path) if name.endswith('pth') else save_file(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep) if keep < 1 else keep])
        with pytest.raises(ValueError, match=rf'{name} (cannot be read|was refused)'):
            read_checkpoint(path)

    def test_a_damaged_tensor_is_refused(self, tmp_path):
        """Else a bad disk or download would be exported: `torch.load` looks at no checksum."""
        path = tmp_path / 'flipped.pth'
        weights = torch.arange(1000, dtype=torch.float64)
        torch.save({'state_dict': {'a': weights}}, path)
        assert read_checkpoint(path).state_dict['a'].equal(weights)
        content = path.read_bytes()
        middle = content.index(weights[500].numpy().tobytes())
        path.write_bytes(content[:middle] + b'damage' + content[middle + 6 :])
        with pytest.raises(
            ValueError, match=r'flipped.pth cannot be read, .* the checksum of .*/data/0 in it is wrong'
        ):
            read_checkpoint(path)

    def test_a_file_without_checksums_is_read(self, tmp_path):
        """Some switch them off for speed; such a file is whole."""
        serialization = torch.serialization
        if not hasattr(serialization, 'set_crc32_options'):
            pytest.skip('this version of torch always writes checksums')
        serialization.set_crc32_options(False)
        try:
            torch.save({'a': torch.ones(9)}, tmp_path / 'without.pth')
        finally:
            serialization.set_crc32_options(True)
        assert read_checkpoint(tmp_path / 'without.pth').state_dict['a'].equal(torch.ones(9))

    def test_a_pickle_that_would_run_code_is_refused(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'ran'),)

        for protocol_file in ('zip.pth', 'raw.pth'):
            path = tmp_path / protocol_file
            torch.save({'state_dict': Evil()}, path) if 'zip' in protocol_file else path.write_bytes(
                pickle.dumps(Evil())
            )
            with pytest.raises(ValueError, match='was refused'):
                read_checkpoint(path)
        assert not (tmp_path / 'ran').exists()

    def test_a_file_without_weights_is_refused(self, tmp_path):
        for content in ({}, {'epoch': 3}, [1, 2], torch.ones(1)):
            torch.save(content, tmp_path / 'x.pth')
            with pytest.raises(ValueError, match='holds no state dict'):
                read_checkpoint(tmp_path / 'x.pth')
