"""Registers the sd_resnet models as soon as a program imports timm. Started by `sd_resnet.pth` at Python's start.

timm has no plugin discovery, so a finder waits on `sys.meta_path` for the import of `timm`, lets timm's own loader
run, imports `sd_resnet` after it, and is gone. `SD_RESNET_AUTOLOAD=0` turns it off. This module is imported at every
start of Python: it imports nothing that Python has not loaded by then, and it never raises.
"""

import sys


class _Finder:
    """Finds `timm` as the other finders do, with a loader that imports the plugin afterwards.

    And `sd_resnet`, for one look at whether it is a package.
    """

    busy = set()  # noqa: RUF012 - typing is not imported at Python's start

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in ('timm', 'sd_resnet') or name in cls.busy:
            return None
        cls.busy.add(name)  # the finders asked below may look for it through the import system again
        try:
            for finder in sys.meta_path:
                find_spec = None if finder is cls else getattr(finder, 'find_spec', None)
                spec = find_spec(name, path, target) if find_spec else None
                if spec is not None:
                    if name == 'sd_resnet':
                        _check(spec)
                    elif hasattr(spec.loader, 'exec_module'):
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            cls.busy.discard(name)


class _Loader:
    """timm's own loader, but for one import after it. Looking for the spec alone does not use it up."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        if name == '_loader':
            raise AttributeError(name)  # not there yet in a copy that is being made
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # timm and its users see the loader that they would see without this module
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            import sd_resnet  # noqa: F401
        except Exception as error:
            _warn(
                'sd_resnet could not be imported, so its models are not registered with timm: '
                f'{type(error).__name__}: {error} (SD_RESNET_AUTOLOAD=0 turns automatic registration off)'
            )
        finally:
            # A new list: one that shrinks while another thread walks it would hide a finder from that thread
            sys.meta_path = [finder for finder in sys.meta_path if finder is not _Finder]


def _check(spec):
    """Python imports a folder without `__init__.py` too, as an empty package: one left by a checkout that has moved."""
    if spec.loader is None:
        folders = ', '.join(spec.submodule_search_locations or ())
        _warn(
            f'sd_resnet is not there, so its models are not registered with timm: {folders} has no __init__.py and is '
            'imported as an empty package; install sd_resnet again, or remove that folder'
        )


def _warn(message):
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # python -W error: timm must be imported all the same
        print(f'RuntimeWarning: {message}', file=sys.stderr)


def install():
    """Wait for `timm`, unless it is there already, or SD_RESNET_AUTOLOAD=0."""
    try:
        os = sys.modules.get('os')  # site has imported it; without site there are no .pth files
        if os is None or os.environ.get('SD_RESNET_AUTOLOAD') == '0' or _Finder in sys.meta_path:
            return
        if 'timm' not in sys.modules:
            sys.meta_path.insert(0, _Finder)
    except Exception:
        pass
