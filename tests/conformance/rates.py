"""timm's unmodified train.py, its drop-path rates recorded: `python rates.py OUT TRAIN.PY arguments`.

OUT gets, as JSON, every block's rate in each training step.
"""

import json
import runpy
import sys
from pathlib import Path


def main(out, script, *arguments):
    sys.path.insert(0, str(Path(script).parent))  # a script's own folder comes first: the clone's timm
    from sd_resnet.core.ramp import DropPathRamp

    seen, advance = [], DropPathRamp.advance

    def recorded(self):
        advance(self)
        seen.append([drop_path.drop_prob for drop_path in self._drop_paths])

    DropPathRamp.advance = recorded
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name='__main__')
    Path(out).write_text(json.dumps(seen))


if __name__ == '__main__':
    main(*sys.argv[1:])
