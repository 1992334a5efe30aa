"""A codebook that the task trains too.

Shapes: N tokens, D width, C codes.
"""

from torch import Tensor

from pipeline.moe.quantizers.base import Quantized
from pipeline.moe.quantizers.nearest import Nearest, compare

# Against distances per element, which change far less than a router's scores do: at 1 assignments hardly learn.
TEMPERATURE = 0.05


class Task(Nearest):
    """As `nearest`, and the chosen expert's output is weighted by 1 + p_j - sg(p_j).

    p = softmax_j(-||x - v_j||^2 / (D t)), t = 0.05: the value stays 1, while the task moves tokens and codes towards each
    other where the expert of the code helps, and apart where it does not, as with a router's probability.
    """

    def _quantize(self, x_ND: Tensor) -> Quantized:
        distance_NC, code_N, codebook, commitment = compare(x_ND, self.codebook_CD)
        scores_NC = distance_NC * (-1 / (x_ND.shape[1] * TEMPERATURE))
        chosen_N1 = scores_NC.softmax(1).gather(1, code_N[:, None])
        return self._of(code_N, codebook, commitment, scores_NC, 1 + (chosen_N1 - chosen_N1.detach()))
