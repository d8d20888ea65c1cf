"""What the converted blocks of one network share: how they draw."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..core.draws import Draw, draw
from ..core.private_api import recomputing
from ..core.ramp import DropPathRamp
from ..core.refusals import check_counts_steps, check_draws_on_host, check_traceable
from ..resnets.ranks import SharedGenerator, ranks_share, takes_gradients

_REMEMBERED = 2**14  # passes through a block between a forward pass and its backward pass


class Draws:
    """How the converted blocks of one network draw.

    When a block runs, from torch's default CPU generator, which activation checkpointing restores for its second pass.
    What is not drawn from there, because ranks share it or a ramp has moved on, is remembered under a ticket that is.
    """

    def __init__(self, sync: bool, ramp: DropPathRamp | None, input_size: tuple[int, int, int]) -> None:
        self.sync, self.ramp = sync, ramp
        self.input_size = input_size  # of the images that the blocks were found with
        self.counting: list[Any] = []  # with a ramp all blocks: a step begins at the first that trains
        self._generator = SharedGenerator()
        self._remembered: OrderedDict[int, Any] = OrderedDict()

    @torch.compiler.disable
    def draw(self, block: Any, x: Tensor) -> Draw:
        """The block's draw for this pass; a RuntimeError where a recomputation does not find it."""
        check_traceable(x)
        drop_path = block.block_drop_path
        # Whatever the rate: in a ramp it moves on
        shared = drop_path.mode == 'batch' and ranks_share(x, self.sync, block.modules())
        if not shared and self.ramp is None:
            return draw([drop_path], x, drop_path.mode)[0]
        ticket, drawn = self._recalled(block, x)
        if drawn is None:
            drawn = draw([drop_path], x, drop_path.mode, self._generator.get() if shared else None)[0]
            # A mask is drawn again: it is of the images' device
            self._remember(ticket, Draw(drawn.p_l, True) if isinstance(drawn.b_l, Tensor) else drawn)
        elif drop_path.mode == 'row':
            return Draw(drawn.p_l, drop_path.mask(x, drawn.p_l))
        elif not shared:
            draw([drop_path], x, drop_path.mode)
        return drawn

    @torch.compiler.disable
    def probs_in_force(self, block: Any, drop_paths: list[Any], x: Any) -> list[int]:
        """p_l of these drop paths in this pass, in units of 1 / `UNIT`; a RuntimeError as `draw`."""
        check_traceable(x)
        if self.ramp is None:
            return [drop_path.p_l_in_units for drop_path in drop_paths]
        ticket, probs = self._recalled(block, x)
        if probs is None:
            probs = [drop_path.p_l_in_units for drop_path in drop_paths]
            self._remember(ticket, probs)
        return probs

    def _recalled(self, block: Any, x: Any) -> tuple[int, Any]:
        """A ticket, and what was remembered under it, if this is a recomputation; else a step may begin."""
        if block.block_drop_path.mode != 'row':
            check_draws_on_host(block.block_drop_path.mode)
        if self.ramp is not None:
            check_counts_steps(block)
        # Of the default generator both passes take the same numbers, whether they use them or not
        ticket = int(torch.randint(2**63 - 1, (), device='cpu'))
        if recomputing():  # the ticket alone does not tell: who seeds anew in every epoch meets it again
            if ticket not in self._remembered:
                raise RuntimeError(
                    'a checkpointed region runs again, and its draws are not known: use preserve_rng_state=True, and '
                    f'run the backward pass in the process of the forward pass, after at most {_REMEMBERED} blocks'
                )
            return ticket, self._remembered[ticket]
        first = next((each for each in self.counting if each.block_drop_path.training), None)
        if self.ramp is not None and block is first and takes_gradients(x):
            self.ramp.advance()
        return ticket, None

    def _remember(self, ticket: int, value: Any) -> None:
        self._remembered[ticket] = value
        self._remembered.move_to_end(ticket)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_remembered': OrderedDict()}
