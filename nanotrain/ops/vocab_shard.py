"""How the rows of an output matrix are spread over ranks, as far as a loss has to know."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of the output matrix are `first_row ... first_row + rows - 1`.

    The reductions run over the ranks that hold the other rows, return the reduced tensor and may work in place.
    An engine with a vocabulary-parallel head supplies them; without one a loss gets None.
    """

    first_row: int
    all_reduce_max: Callable[[Tensor], Tensor]
    all_reduce_sum: Callable[[Tensor], Tensor]
