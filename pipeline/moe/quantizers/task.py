"""A codebook that the task trains too.

Shapes: N tokens, D width, C codes.
"""

from torch import Tensor

from pipeline.moe.quantizers.kmeans import distances
from pipeline.moe.quantizers.nearest import Nearest

TEMPERATURE = 0.1  # against distances per element: those to the two nearest codes differ by 0.05 to 0.6


class Task(Nearest):
    """As `nearest`, and the chosen expert's output is weighted by 1 + p_j - sg(p_j).

    p = softmax_j(-||x - v_j||^2 / (D t)), t = 0.1: the value stays 1, while the task moves tokens and codes towards each
    other where the expert of the code helps, and apart where it does not, as with a router's probability.
    """

    def _assign(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        distance_NC = distances(x_ND, self.codebook_CD)
        code_N = distance_NC.argmin(1)
        chosen_N1 = (-distance_NC / (x_ND.shape[1] * TEMPERATURE)).softmax(1).gather(1, code_N[:, None])
        return code_N, 1 + (chosen_N1 - chosen_N1.detach())
