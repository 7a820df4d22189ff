"""The coefficients of a step whose number only the GPU knows: one launch for all parameters.

The optimizer's coefficients are written down as operations on the step (:class:`ademamix.engine.tape.Tape`)
and compiled by Triton, with the host's numbers as data: another learning rate compiles nothing.
"""

# mypy: disable-error-code="no-untyped-def"
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ademamix.backends import capturing, sent_to
from ademamix.backends.triton import define, made_current, xp
from ademamix.engine.tape import Tape

ROWS = 128  # of one program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@cache
def kernel(structure: tuple[str, ...], results: tuple[str, ...], count: int) -> Any:
    """The kernel that computes these operations, with ``count`` numbers of the host's, not compiled yet.

    It reads and counts each parameter's step, and writes a row of the table: the factor on its gradient, which is the
    first result times ``factor``, the steps done before this one, and the other results.
    """
    first, *others = results
    lines = [
        f"i = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})",
        "here = i < members",
        "step = tl.load(steps + i, mask=here, other=0).to(tl.pointer_type(tl.float64))",
        "done = tl.load(step, mask=here, other=0.0)",
        "t = done + 1.0",
        f"given = numbers + tl.load(groups + i, mask=here, other=0) * {count}",
        *(f"n{k} = tl.load(given + {k})" for k in range(count)),
        *structure,
        f"out = table + tl.load(rows + i, mask=here, other=0) * {1 + len(results)}",
        f"tl.store(out, {first} * tl.load(factor).to(tl.float64), mask=here)",
        "tl.store(out + 1, done, mask=here)",
        *(f"tl.store(out + {k}, {x}, mask=here)" for k, x in enumerate(others, 2)),
        "tl.store(step, tl.where(tl.load(skip) == 0, t, done), mask=here)",
        "",
    ]
    head = "def coefficients(steps, rows, groups, numbers, factor, skip, table, members):\n    "
    scope: dict[str, Any] = {"tl": tl, "minimum": xp.minimum, "maximum": xp.maximum}
    return triton.jit(define("coefficients", head + "\n    ".join(lines), scope))


class Table:
    """The table of the parameters on one device.

    Args:
        steps: their counters, float64 tensors of no dimensions there.
        of_group: the group of each.
    """

    def __init__(self, steps: Sequence[Tensor], of_group: Sequence[int]) -> None:
        self.device, self.steps, self.of_group = steps[0].device, list(steps), list(of_group)
        self.one = torch.ones((), dtype=torch.float32, device=self.device)  # as factors are: one kernel serves both
        self.never = torch.zeros((), dtype=torch.uint8, device=self.device)
        self.shape: Any = None  # what the arrays below were made for
        self.members: list[tuple[Any, ...]] = []  # of each structure: its kernel, its tapes' groups, arrays
        self.sent: tuple[list[list[float]], list[Tensor]] = ([], [])
        self.counted = False  # whether a step that failed was counted for some
        self.captured: list[Any] = []  # what graphs read whenever they are replayed

    def __call__(self, tapes: Sequence[Tape], factor: Tensor | None, skip: Tensor | None) -> Tensor | None:
        """The table, on its way; every counter is one higher then, unless ``skip``.

        Args:
            tapes: of each group: a factor on the gradient, then the rule's coefficients in their order.
            factor: multiplies all gradients, of one element on the device.
            skip: boolean, of one element on the device.

        Returns:
            None, with nothing done, where a graph captures what would have to be sent to the device first.
        """
        captured = capturing(self.device)
        shape = [(tape.lines, tape.results, len(tape.numbers)) for tape in tapes]
        if shape != self.shape:
            if captured:
                return None
            self._arrange(shape)
        numbers = [[0.0 if isinstance(x, Tensor) else x for x in tape.numbers] for tape in tapes]
        if numbers != self.sent[0]:
            if captured:
                return None
            self.sent = (
                numbers,
                [
                    sent_to(self.device, torch.tensor([numbers[i] for i in groups], dtype=torch.float64, device="cpu"))
                    for _, groups, _ in self.members
                ],
            )
        width = 1 + len(tapes[0].results)
        table = torch.empty(len(self.steps), width, dtype=torch.float64, device=self.device)
        factor = self.one if factor is None else factor
        self.counted = False
        flag = self.never if skip is None else skip.view(torch.uint8)
        for (kernel, groups, arrays), given in zip(self.members, self.sent[1], strict=True):
            late = [(n, k, x) for n, i in enumerate(groups) for k, x in enumerate(tapes[i].numbers)]
            late = [(n, k, x) for n, k, x in late if isinstance(x, Tensor)]
            source = given
            if late:  # hyperparameters that only the device knows
                given = source.clone()
                for n, k, x in late:
                    given[n, k] = sent_to(self.device, x).squeeze()
            with made_current(self.device):
                count = len(arrays[0])
                kernel[(triton.cdiv(count, ROWS),)](*arrays, given, factor, flag, table, count, **OPTIONS)
            self.counted = True
            if captured:
                self.captured.append((arrays, source, given))
        return table

    def _arrange(self, shape: list[tuple[Any, ...]]) -> None:
        of_structure: dict[Any, list[int]] = defaultdict(list)
        for i, each in enumerate(shape):
            of_structure[each].append(i)
        self.members = []
        for structure, groups in of_structure.items():
            rows = [row for row, i in enumerate(self.of_group) if i in groups]
            if rows:
                arrays = (
                    np.array([self.steps[row].data_ptr() for row in rows], np.int64),
                    np.array(rows, np.int32),
                    np.array([groups.index(self.of_group[row]) for row in rows], np.int32),
                )
                on_gpu = tuple(sent_to(self.device, torch.from_numpy(array)) for array in arrays)
                self.members.append((kernel(*structure), groups, on_gpu))
        self.shape, self.sent = shape, ([], [])
