"""Recipes for timm's `train.py --config FILE`: one YAML file each, whose first comment line says what it is."""

from pathlib import Path


def recipes() -> dict[str, tuple[Path, str]]:
    """File and first line of each recipe, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob('*.yaml')):
        with path.open(encoding='utf-8') as file:
            found[path.stem] = (path, file.readline().lstrip('# ').strip())
    return found
